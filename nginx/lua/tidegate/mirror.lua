--- Sends copies of requests to a second upstream, and counts them there.
--
-- Why apart from the balancer: a copy shares its variables with the request it was made of, so that
-- nothing may be written to them here, and a copy that fails is of no further interest.

local attempts = require "tidegate.attempts"
local balancer = require "tidegate.balancer"
local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"
local selection = require "tidegate.selection"
local set_current_peer = require("ngx.balancer").set_current_peer

local ngx = ngx
local var = ngx.var

local _M = {}


--- Body of `balancer_by_lua`.
function _M.balance()
    local name = var.tidegate_mirror
    metrics.begin(metrics.of(name))
    local upstream = balancer.lookup(name)
    local index = upstream and selection.peek(upstream)
    if not index then
        return ngx.exit(attempts.NO_PEER)
    end
    local ok, err = set_current_peer(peers.host(upstream, index), upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: mirror ", name, ": ", err)
        return ngx.exit(attempts.NO_PEER)
    end
end


--- Body of `log_by_lua` of the location of the copies: one that got as far as the balancer counts.
function _M.log()
    if metrics.is_under_way() then
        metrics.log()
    end
end


return _M
