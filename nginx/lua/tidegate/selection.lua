--- Which peer of an upstream gets a request.
--
-- Why: the rank of the peers and what a policy asks for come together here: sessions, limits, slow
-- start, backups. Whether a peer can be sent to says `health.usable`, and `health.possible` where
-- none is. What a policy does not ask for costs nothing: `open` finds out which upstreams are
-- plain. Must not wait and must not connect.

local health = require "tidegate.health"
local load = require "tidegate.load"
local peers = require "tidegate.peers"
local pickers = require "tidegate.pickers"
local policies = require "tidegate.policy"
local sticky = require "tidegate.sticky"

local hash = require "tidegate.pickers.hash"

local calm = health.calm
local key_of = peers.key
local max = math.max
local may_be_asked = health.possible
local now = ngx.now
local random = math.random
local sum = load.sum
local usable = health.usable

local DRAIN_GRACE = 1.5     -- a task gets its SIGTERM 2 to 3 s after it is seen draining
local SLOWEST = 0.02        -- of its weight, for a peer that has just come
local RACES = 8             -- times that another worker may take the last place before we do

local _M = { FULL = "full" }


-- Until when peers of this version start slowly; 0 where none does.
local function slow_until(upstream)
    local seconds, result = upstream.policy.slow_start, 0
    if seconds > 0 then
        for index = 0, upstream.up - 1 do
            local peer = upstream.peers[index]
            if peer.late == 1 then
                result = max(result, peer.since + seconds)
            end
        end
    end
    return result > now() and result or 0
end


local function view_of(upstream, first, count, total_weight, uniform, key)
    return {
        policy = upstream.policy,
        blob = upstream.blob,
        head = upstream.head,
        peers = upstream.peers,
        cell = upstream.head.cell,
        first = first,
        count = count,
        total_weight = total_weight,
        uniform = uniform,
        key = key,
    }
end


-- Sessions that are told by something of the client's: a ring of the admitted and draining peers.
local function session_ring(upstream, before)
    local head, kind = upstream.head, upstream.policy.sticky.kind
    local first, count = head.backups, head.up - head.backups + head.draining
    if count == 0 then
        return nil
    end
    local total = head.total_weight
    for index = head.up, head.up + head.draining - 1 do
        total = total + upstream.peers[index].weight
    end
    local key = kind == "ip" and "ip" or "cookie:" .. upstream.policy.sticky.cookie
    return hash.new(view_of(upstream, first, count, total, head.draining == 0
                            and upstream.uniform, key), before and before.ring)
end


local function settle(upstream)
    upstream.simple = upstream.regular > 0 and not upstream.session and not upstream.ring
        and upstream.limit == 0 and upstream.slow_until == 0
    upstream.plain = upstream.simple and not upstream.counted and not upstream.policy.canary
end


--- Adds what choosing needs to an opened version; `before` is the one it follows, if any.
function _M.open(upstream, before)
    local head, policy = upstream.head, upstream.policy
    upstream.accepting = {} -- index of a draining peer → until when it may be sent to anyhow
    upstream.regular = head.up - head.backups
    if upstream.regular > 0 then
        upstream.picker = pickers.new(
            view_of(upstream, head.backups, upstream.regular, head.total_weight,
                    upstream.uniform), before and before.picker)
    end
    if head.backups > 0 then
        upstream.backup_picker = pickers.new(
            view_of(upstream, 0, head.backups, head.backup_weight, false),
            before and before.backup_picker)
    end
    upstream.counted = head.cell ~= 0 and policies.counts_load(policy)
    upstream.timed = policy.algorithm == "ewma"
    upstream.limit = upstream.counted and policy.max_conns or 0
    upstream.queue = upstream.limit > 0 and policy.queue or 0
    upstream.slow_until = slow_until(upstream)
    if policy.sticky and policy.sticky.kind == "cookie" then
        upstream.session = sticky.new(upstream, before and before.session)
    elseif policy.sticky then
        upstream.ring = session_ring(upstream, before)
    end
    if upstream.counted then
        upstream.stats.ended = true
    end
    settle(upstream)
end


local function has_room(upstream, index)
    local cell = upstream.peers[index].cell
    return upstream.limit == 0 or cell == 0 or sum(cell) < upstream.limit
end


-- Whether a peer that starts slowly lets this request pass by.
local function hangs_back(upstream, index, at)
    local peer = upstream.peers[index]
    if peer.late == 0 or index >= upstream.up then
        return false
    end
    local share = (at - peer.since) / upstream.policy.slow_start
    return share < 1 and random() >= max(share, SLOWEST)
end


-- What the search for a peer is about. Nothing yields here, so one is enough.
local search = {
    upstream = nil,     -- the opened version
    tried = nil,        -- Unix time by "address:port": not to be tried unless it came up since
    fresh = true,       -- only usable ones
    slowly = true,      -- peers that start slowly may hang back
    at = 0,
    full = false,       -- a peer was left out because it has no room
}


local function possible(it, index)
    local upstream = it.upstream
    local sent = it.tried and it.tried[key_of(upstream, index)]
    if sent and upstream.peers[index].since <= sent then
        return false
    elseif it.fresh then
        return usable(upstream, index, it.at)
    end
    return may_be_asked(upstream, index)
end


local function fine(it, index)
    if not possible(it, index) then
        return false
    end
    local upstream = it.upstream
    if not has_room(upstream, index) then
        it.full = true
        return false
    end
    return not (it.slowly and upstream.slow_until > it.at and hangs_back(upstream, index, it.at))
end


-- An admitted peer: a regular one, else a backup.
local function find_up(upstream)
    local index
    if upstream.regular > 0 then
        index = upstream.picker:search(fine, search)
        if not index and upstream.slow_until > search.at then
            search.slowly = false
            index = upstream.picker:search(fine, search)
            search.slowly = true
        end
    end
    if not index and upstream.backup_picker then
        index = upstream.backup_picker:search(fine, search)
    end
    return index
end


-- The peers from `first` on, in turn; those that came into their state before `not_before` only
-- while they are known to accept.
local function find_other(upstream, first, count, not_before)
    local start, at = (upstream.turn or 0) + 1, search.at
    upstream.turn = start
    for step = 0, count - 1 do
        local index = first + (start + step) % count
        if (upstream.peers[index].since > not_before or at < (upstream.accepting[index] or 0))
                and fine(search, index) then
            return index
        end
    end
    return nil
end


-- Any peer, by rank: admitted; draining, which may not be there any more, so where a replacement
-- is expected only for a short time or where `tidegate.last_resort` vouches for it; being probed,
-- where nothing else is to be hoped for. While one only lacks room, no worse one is taken.
local function choose(upstream)
    local index
    if upstream.up > 0 then
        index = find_up(upstream)
    end
    if not index and not search.full and upstream.draining > 0 then
        index = find_other(upstream, upstream.up, upstream.draining,
                           upstream.hold > 0 and search.at - DRAIN_GRACE or 0)
    end
    if not index and not search.full and upstream.probing > 0 and upstream.hold == 0 then
        index = find_other(upstream, upstream.up + upstream.draining, upstream.probing, 0)
    end
    return index
end


local function begin(upstream, tried, fresh)
    search.upstream, search.tried, search.fresh = upstream, tried, fresh
    search.slowly, search.full, search.at = true, false, now()
end


-- The peer that the request's session belongs to, if it can be sent to.
-- @return index, or nil and whether it only lacks room
local function find_session(upstream)
    local index
    if upstream.session then
        index = sticky.find(upstream)
    else
        local key = upstream.ring.key()
        if key and key ~= "" then
            index = upstream.ring:search(possible, search)
        end
    end
    if not index or not possible(search, index) then
        return nil, false
    end
    if has_room(upstream, index) then
        return index, false
    end
    return nil, true
end


-- @return index and whether the client is to be told of it; or nil, `FULL` where room is all that
--   lacks, and whether it does so with the session's own peer
local function find(upstream)
    local lacks_room = false
    if upstream.session or upstream.ring then
        local index
        index, lacks_room = find_session(upstream)
        if index then
            return index, false
        elseif lacks_room and upstream.queue > 0 then
            return nil, _M.FULL, true
        end
    end
    local index = choose(upstream)
    if not index then
        return nil, search.full and _M.FULL or nil
    end
    return index, upstream.session ~= nil and not lacks_room
end


-- Counts the request with a peer, if there still is room.
local function take(upstream, index)
    if upstream.counted then
        local cell = upstream.peers[index].cell
        if upstream.limit > 0 and cell ~= 0 then
            if not load.reserve(cell, upstream.limit) then
                return false
            end
        else
            load.add(cell, 1)
        end
        load.begin(cell, upstream.head.cell, upstream.timed)
    end
    return true
end


--- Index of the peer for the current request, which is counted with it from now on.
-- @param tried as `attempts.tried` gives it, nil for none
-- @param strict whether there is to be none rather than one that is not usable
-- @return index; or nil, `FULL` where room is all that lacks, and whether it does so with the peer
--   of the request's session
function _M.select(upstream, tried, strict)
    if upstream.simple and not tried and calm(upstream) then
        local index = upstream.picker:next()
        take(upstream, index)
        return index
    end
    if upstream.slow_until > 0 and upstream.slow_until < now() then
        upstream.slow_until = 0
        settle(upstream)
    end
    for _ = 1, RACES do
        begin(upstream, tried, true)
        local index, tell, session = find(upstream)
        if not index and tell ~= _M.FULL and not strict then
            search.fresh = false
            index, tell, session = find(upstream)
        end
        if not index then
            return nil, tell, session
        end
        if take(upstream, index) then
            if tell then
                sticky.set(upstream, index)
            end
            return index
        end
    end
    return nil, _M.FULL
end


--- Whether the current request belongs to a session of `upstream`, by a cookie of ours.
function _M.knows(upstream)
    return upstream.session ~= nil and sticky.find(upstream) ~= nil
end


--- Whether a request to `upstream` could go to a usable peer.
-- @param tried as for `select`
function _M.ready(upstream, tried)
    begin(upstream, tried, true)
    return choose(upstream) ~= nil or search.full
end


--- Index of a peer for a request that belongs to no session and is counted with nobody: a copy of
-- another one. nil where there is none.
function _M.peek(upstream)
    begin(upstream, nil, true)
    local index = choose(upstream)
    if not index then
        search.fresh = false
        index = choose(upstream)
    end
    return index
end


--- Lets requests go to a draining peer until `until_`, however long it has been draining.
function _M.allow(upstream, index, until_)
    upstream.accepting[index] = until_
end


return _M
