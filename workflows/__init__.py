"""How stages are joined and run: configuration, Dask, feedback, report and command line."""
