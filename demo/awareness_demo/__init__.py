"""What the demo, the tests and the benchmarks read: two small models, anchors, held-out texts."""
