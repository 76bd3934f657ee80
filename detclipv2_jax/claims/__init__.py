"""The paper's findings as runs on a laptop, and what they say."""
