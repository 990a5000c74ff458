"""What can be measured: one module per scenario, each with its `SCENARIO`."""
