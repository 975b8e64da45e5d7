"""Operations on KV states. `reference` is plain torch: the CPU path and the oracle of every kernel."""
