from orchard.tables import read_evaluations as read_evaluations
from orchard.tables import read_metrics as read_metrics
from serve.client import AsyncClient as AsyncClient
from serve.client import Client as Client
from serve.local import LocalPolicy as LocalPolicy
from serve.local import load as load
