"""Answers of the target for given prompts: what a draft should be trained on."""
