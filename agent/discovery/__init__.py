"""Sources of workloads. Nothing below here knows nginx."""
