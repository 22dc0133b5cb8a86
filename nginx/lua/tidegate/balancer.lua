--- Picks the peer for a request: all that Tidegate does on the path of every request.
--
-- Why: one read of the upstream's name, one of its version number; all else is this worker's own
-- memory until that number changes. Nothing here waits; a request that finds no peer fails over
-- to `tidegate.hold`.

local balancer = require "ngx.balancer"
local codec = require "tidegate.codec"
local metrics = require "tidegate.metrics"
local pickers = require "tidegate.pickers"
local policies = require "tidegate.policy"
local store = require "tidegate.store"

local ptr = ngx.shared.tidegate_ptr

local begin = metrics.begin
local exit = ngx.exit
local find = string.find
local get_last_failure = balancer.get_last_failure
local gmatch = string.gmatch
local gsub = string.gsub
local min = math.min
local now = ngx.now
local pairs = pairs
local set_current_peer = balancer.set_current_peer
local set_more_tries = balancer.set_more_tries
local var = ngx.var

local ERROR = ngx.ERROR
local MAX_TRIES = 5
local DRAIN_GRACE = 1.5     -- a task gets its SIGTERM 2 to 3 s after it is seen draining
local EJECTION = 1
local MAX_EJECTION = 8
local FORGIVEN = 30         -- seconds after which an ejection's length starts anew

local _M = {}

local known = {}            -- upstream name → what this worker has made of its version
local ejected = {}          -- "address:port" → {at, until_, length} in this worker
local ejections = 0


-- What the worker needs of a version; `blob` keeps the records alive.
local function open(name, blob, number, before)
    local head, peers = codec.head(blob), codec.peers(blob)
    local policy = policies.parse(codec.policy(blob, head))
    local candidates = head.up + head.draining
    if head.hold == 0 then
        candidates = candidates + head.probing
    end
    local tries = min(candidates, MAX_TRIES)
    return {
        name = name,
        number = number,
        blob = blob,
        peers = peers,
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        hold = head.hold,
        policy = policy,
        tries = tries > 1 and tries,
        hosts = {},
        accepting = {},     -- index of a draining peer → until when it may be sent to anyhow
        stats = metrics.of(name),
        picker = pickers.new(policy.algorithm, {
            policy = policy,
            peers = peers,
            count = head.up,
            uniform = head.uniform == 1,
            total_weight = head.total_weight,
        }, before and before.picker),
    }
end


local function refresh(name, before)
    local blob, number = store.get(name)
    local upstream = blob and open(name, blob, number, before)
    known[name] = upstream
    return upstream
end


--- Upstream `name` as it is now; nil where there is none.
local function lookup(name)
    local number = ptr:get(name)
    local upstream = known[name]
    if upstream and upstream.number == number then
        return upstream
    end
    return refresh(name, upstream)
end


_M.lookup = lookup


local function host_of(upstream, index)
    local host = upstream.hosts[index]
    if not host then
        local peer = upstream.peers[index]
        host = codec.host(peer.family, peer.address)
        upstream.hosts[index] = host
    end
    return host
end


local function key_of(upstream, index)
    return host_of(upstream, index) .. ":" .. upstream.peers[index].port
end


-- Whether this worker keeps away from the peer; a peer that has come up since is a new one.
local function is_ejected(upstream, index, key, at)
    local ejection = ejected[key]
    return ejection ~= nil and at < ejection.until_
        and upstream.peers[index].since <= ejection.at
end


local function usable(upstream, index, tried, fresh, at)
    local key = key_of(upstream, index)
    if tried and tried[key] then
        return false
    end
    return not (fresh and is_ejected(upstream, index, key, at))
end


-- The first usable one of the admitted peers in the picker's order, then in any.
local function find_up(upstream, tried, fresh, at)
    local count = upstream.up
    for _ = 1, min(count, 16) do
        local index = upstream.picker:next()
        if usable(upstream, index, tried, fresh, at) then
            return index
        end
    end
    for index = 0, count - 1 do
        if usable(upstream, index, tried, fresh, at) then
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
                and usable(upstream, index, tried, fresh, at) then
            return index
        end
    end
    return nil
end


-- Any peer, by rank: admitted; draining, which may not be there any more, so where a replacement
-- is expected only for a short time or where `tidegate.last_resort` vouches for it; being probed,
-- where nothing else is to be hoped for. `fresh` leaves out those that have just refused a
-- connection.
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


local function select_peer(upstream, tried)
    local at = now()
    return choose(upstream, tried, true, at) or choose(upstream, tried, false, at)
end


--- Whether a request to `upstream` could go to a peer that has not just failed here.
function _M.ready(upstream)
    return choose(upstream, nil, true, now()) ~= nil
end


--- Whether no admitted peer is left that has not just failed here. Unlike `ready` it takes nobody's
-- turn, so that it may be asked before each request.
function _M.is_exhausted(upstream)
    if upstream.up > 0 and ejections == 0 then
        return false
    end
    local at = now()
    for index = 0, upstream.up - 1 do
        if not is_ejected(upstream, index, key_of(upstream, index), at) then
            return false
        end
    end
    return true
end


--- The peer whose turn it is, as an index; nil where there is none.
function _M.pick(upstream)
    return select_peer(upstream)
end


--- Host and port of a peer.
function _M.address(upstream, index)
    return host_of(upstream, index), upstream.peers[index].port
end


--- Lets requests go to a draining peer until `until_`, however long it has been draining.
function _M.allow(upstream, index, until_)
    upstream.accepting[index] = until_
end


local function eject(key)
    local at, before = now(), ejected[key]
    if before and at < before.until_ then
        return
    end
    if not before then
        ejections = ejections + 1
    end
    local length = before and at < before.until_ + FORGIVEN
        and min(before.length * 2, MAX_EJECTION) or EJECTION
    ejected[key] = { at = at, until_ = at + length, length = length }
end


--- Forgets ejections that are long over, and upstreams that are gone.
function _M.sweep()
    local at = now()
    for key, ejection in pairs(ejected) do
        if at > ejection.until_ + FORGIVEN then
            ejected[key] = nil
            ejections = ejections - 1
        end
    end
    for name in pairs(known) do
        if not store.number(name) then
            known[name] = nil
        end
    end
end


-- The elements of one of nginx's $upstream_… lists since the last internal redirect. While a next
-- peer is asked for, or when there was none, it ends with an empty place for that.
local function attempts(text)
    local list = {}
    for item in gmatch(gsub(gsub(text or "", " : $", ""), "^.* : ", ""), "[^, ]+") do
        list[#list + 1] = item
    end
    return list
end


-- Takes note of the last attempt of this request, if it failed to connect.
-- @return addresses tried since the last internal redirect, as a set
local function note_failure(name)
    local peers, times = attempts(var.upstream_addr), attempts(var.upstream_connect_time)
    local last, tried = #peers, {}
    for index = 1, last do
        tried[peers[index]] = true
    end
    if last > 0 and times[last] == "-" and find(peers[last], ":", 1, true) then
        eject(peers[last])
        metrics.add(name, metrics.CONNECT_FAILURES)
    end
    return tried
end


--- Takes note of the failure of the last peer that this request was sent to, where none was asked
-- for after it.
function _M.note_last_failure(name)
    if not find(var.upstream_addr or "", " : $") then
        note_failure(name)
    end
end


--- Body of `balancer_by_lua`.
function _M.balance()
    local name = var.tidegate_upstream
    local upstream = lookup(name)
    local failure = get_last_failure()
    local index
    if failure then
        local tried = note_failure(name)
        index = upstream and select_peer(upstream, tried)
        if not index then
            return exit(ERROR)
        end
        metrics.add(name, metrics.RETRIES)
    else
        if upstream then
            if upstream.up > 0 and ejections == 0 then
                index = upstream.picker:next()
            else
                index = select_peer(upstream)
            end
            begin(upstream.stats)
        end
        if not index then
            -- Debian's build has no way to answer 503 from here; `hold` sorts it out.
            var.tidegate_no_peer = "1"
            return exit(ERROR)
        end
        if upstream.tries then
            set_more_tries(upstream.tries)
        end
    end
    local ok, err = set_current_peer(upstream.hosts[index] or host_of(upstream, index),
                                     upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: upstream ", name, ": ", err)
        return exit(ERROR)
    end
end


return _M
