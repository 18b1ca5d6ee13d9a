"""The backend: options, the pipeline, the hand-over to inner compilers, the report, the command line."""
