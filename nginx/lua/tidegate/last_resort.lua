--- Finds out whether draining peers still accept, for requests that wait for a replacement in vain.
--
-- Why: some applications go on serving for long after their SIGTERM, others close at once, and only
-- a connection tells them apart. It runs in timers, so that a client that leaves does not take
-- along the answer that others wait for. It sends nothing.

local peers = require "tidegate.peers"
local selection = require "tidegate.selection"

local min = math.min
local now = ngx.now
local tcp = ngx.socket.tcp
local timer_at = ngx.timer.at

local INTERVAL = 0.25   -- between checks of an upstream in a worker, and how long an answer counts
local MAX_PEERS = 8     -- per check

local _M = {}


local function check(premature, upstream, index)
    if premature then
        return
    end
    local socket = tcp()
    socket:settimeout(INTERVAL * 1000)
    if socket:connect(peers.host(upstream, index), upstream.peers[index].port) then
        selection.allow(upstream, index, now() + INTERVAL)
    end
    socket:close()
end


--- Starts a check of the draining peers, unless the last one is quite new. Those that accept are
-- there to be chosen for a moment.
function _M.look(upstream)
    local at = now()
    if at < (upstream.next_look or 0) then
        return
    end
    upstream.next_look = at + INTERVAL
    local first, count = upstream.up, upstream.draining
    local turn = upstream.look_turn or 0
    upstream.look_turn = (turn + MAX_PEERS) % count
    for step = 0, min(count, MAX_PEERS) - 1 do
        local ok, err = timer_at(0, check, upstream, first + (turn + step) % count)
        if not ok then
            ngx.log(ngx.WARN, "tidegate: check of upstream ", upstream.name, ": ", err)
        end
    end
end


return _M
