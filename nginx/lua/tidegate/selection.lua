--- Which peer of an upstream gets a request.
--
-- Why: the rank of the peers and what a policy asks for come together here. Whether a peer can be
-- sent to says `health.usable`, and `health.possible` where none is. Must not wait and must not
-- connect.

local health = require "tidegate.health"
local peers = require "tidegate.peers"
local pickers = require "tidegate.pickers"

local key_of = peers.key
local may_be_asked = health.possible
local min = math.min
local now = ngx.now
local usable = health.usable

local DRAIN_GRACE = 1.5     -- a task gets its SIGTERM 2 to 3 s after it is seen draining

local _M = {}


--- Adds what choosing needs to an opened version; `before` is the one it follows, if any.
function _M.open(upstream, before)
    upstream.accepting = {} -- index of a draining peer → until when it may be sent to anyhow
    upstream.picker = pickers.new(upstream.policy.algorithm, {
        policy = upstream.policy,
        peers = upstream.peers,
        count = upstream.up,
        uniform = upstream.uniform,
        total_weight = upstream.total_weight,
    }, before and before.picker)
end


local function possible(upstream, index, tried, fresh, at)
    local sent = tried and tried[key_of(upstream, index)]
    if sent and upstream.peers[index].since <= sent then
        return false
    elseif fresh then
        return usable(upstream, index, at)
    end
    return may_be_asked(upstream, index)
end


-- The first possible one of the admitted peers in the picker's order, then of any.
local function find_up(upstream, tried, fresh, at)
    local count = upstream.up
    for _ = 1, min(count, 16) do
        local index = upstream.picker:next()
        if possible(upstream, index, tried, fresh, at) then
            return index
        end
    end
    for index = 0, count - 1 do
        if possible(upstream, index, tried, fresh, at) then
            return index
        end
    end
    return nil
end


-- The same for the peers from `first` on, in turn; those that came into their state before
-- `not_before` only while they are known to accept.
local function find_other(upstream, first, count, tried, fresh, at, not_before)
    local start = (upstream.turn or 0) + 1
    upstream.turn = start
    for step = 0, count - 1 do
        local index = first + (start + step) % count
        if (upstream.peers[index].since > not_before or at < (upstream.accepting[index] or 0))
                and possible(upstream, index, tried, fresh, at) then
            return index
        end
    end
    return nil
end


-- Any peer, by rank: admitted; draining, which may not be there any more, so where a replacement
-- is expected only for a short time or where `tidegate.last_resort` vouches for it; being probed,
-- where nothing else is to be hoped for. `fresh` leaves out those that are not usable.
local function choose(upstream, tried, fresh, at)
    local index
    if upstream.up > 0 then
        index = find_up(upstream, tried, fresh, at)
    end
    if not index and upstream.draining > 0 then
        index = find_other(upstream, upstream.up, upstream.draining, tried, fresh, at,
                           upstream.hold > 0 and at - DRAIN_GRACE or 0)
    end
    if not index and upstream.probing > 0 and upstream.hold == 0 then
        index = find_other(upstream, upstream.up + upstream.draining, upstream.probing, tried,
                           fresh, at, 0)
    end
    return index
end


--- Index of the peer for a request; nil where there is none.
-- @param tried as `attempts.tried` gives it, nil for none
function _M.select(upstream, tried)
    local at = now()
    return choose(upstream, tried, true, at) or choose(upstream, tried, false, at)
end


--- Whether a request to `upstream` could go to a usable peer.
-- @param tried as for `select`
function _M.ready(upstream, tried)
    return choose(upstream, tried, true, now()) ~= nil
end


--- Lets requests go to a draining peer until `until_`, however long it has been draining.
function _M.allow(upstream, index, until_)
    upstream.accepting[index] = until_
end


return _M
