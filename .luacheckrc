-- ngx_lua's API, and what luacheck does not know of it yet.
stds.tidegate = { read_globals = { ngx = { fields = { "run_worker_thread" } } } }
std = "ngx_lua+tidegate"
max_line_length = 100
