"""The nouns of Orchard: types, configuration, catalog, policy, data, metrics, errors."""
