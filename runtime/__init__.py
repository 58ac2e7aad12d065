"""Run, serve and measure a model on the machine at hand."""
