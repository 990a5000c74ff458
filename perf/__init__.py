"""What it costs and what it loses: measurements, run from a checkout as `python -m perf.NAME`. Never installed."""
