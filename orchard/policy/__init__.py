"""The policy: model, tokens, prompt template, weights, adapters and its folder."""
