"""Group Influence of every domain on every task: capture, preconditioners, the matrix and its errors."""
