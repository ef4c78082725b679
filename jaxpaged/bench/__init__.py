"""What `jaxpaged bench` measures, from an installed package. The scripts under benchmarks/ write the dated rows."""
