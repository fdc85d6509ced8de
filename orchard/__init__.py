"""The nouns of Orchard: types, configuration, catalogue, policy, data, metrics, errors."""
