"""Speed-up of speculative decoding on benchmark prompts, measured the way users will see it."""
