"""What happens at every step of a training.

- `tracker`: `PowerEMA`, what users hold
- `tracked`: its averages, their updates and their state, and the ordinary EMA
- `tensors`, `wrappers`: which tensors of a model are averaged, and their names
- `averages`, `buffers`: the running averages, accurate in long runs, on the weights' device or in host memory
- `sharding`, `state`: processes, saved states, and snapshots to go on from
"""
