--- What happens in the stream part when nginx starts a worker.
--
-- Why apart from `init`: that is the http part's, in another Lua state.

local bridge = require "tidegate.bridge"

local ngx = ngx

local _M = {}


--- Body of `init_worker_by_lua` of the stream part. Where it succeeds, the instance says that it
-- has the feature `stream`: this write through the shared memory is the proof.
function _M.start_worker()
    math.randomseed(ngx.now() * 1000 + ngx.worker.pid() * 104729)
    local ok, err = bridge.attach()
    if not ok then
        ngx.log(ngx.ERR, "tidegate: no TCP routes and no passthrough: ", err)
        return
    end
    require("tidegate.tcp").start(ngx.shared.tidegate_ctl:get("max_held"))
    ngx.shared.tidegate_ctl:safe_set("stream", 1)
end


return _M
