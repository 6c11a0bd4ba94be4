"""All that is known of the user's loss: masks, target tokens, normalizer, scale."""
