"""Models and texts of the demo, the tests and the benchmarks: two small models, anchors, held-out
texts."""
