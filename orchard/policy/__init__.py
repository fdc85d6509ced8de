"""Policy: model, tokenizer, prompt template, weights, adapters and policy folder."""
