"""PyTorch's settings of memory in a process that trains on a GPU."""

# Without expandable segments, sequences of different lengths fragment the memory. Host memory that several threads register is pinned
# in 0.7 s a GiB instead of 1.0 (`make bench-gpu smoke=true` on an H200).
ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
