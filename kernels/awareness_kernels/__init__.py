"""Operations on KV states; `reference`, plain torch, is the CPU path and every kernel's oracle."""
