"""Core of Orchard: types, configuration, catalog, policy, data, metrics and errors."""
