"""The scenarios: one module each, with its `SCENARIO`."""
