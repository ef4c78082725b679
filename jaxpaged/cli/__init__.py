"""The commands of `jaxpaged`: each module has `add_arguments(parser)` and `run(args)`."""
