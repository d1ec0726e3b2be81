"""`edgelm compare`: reports of `edgelm parity --json` and `edgelm bench --json`, side by side."""
