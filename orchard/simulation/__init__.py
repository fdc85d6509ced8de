"""Simulated users: click models, hidden tastes, and clients that ask an endpoint over HTTP."""
