"""Where it runs: Faust apps, transport, runner, tables, web views, metrics, settings, CLI and the embedded stack."""
