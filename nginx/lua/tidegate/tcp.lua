--- Picks the peer for a TCP connection, in the stream part of a worker.
--
-- Why apart from `balancer`: here are no requests, headers or retries after a byte was sent, and a
-- connection may last for days. The membership is the same, in the same memory (`bridge`), so a
-- change is in force for connections the moment it is acknowledged; open ones are left alone.
-- No module may be loaded here that needs the http part (a test holds the list).

local balancer = require "ngx.balancer"
local codec = require "tidegate.codec"
local counters = require "tidegate.tcp_metrics"
local ejections = require "tidegate.ejections"
local policies = require "tidegate.policy"

local dat = ngx.shared.tidegate_dat
local ptr = ngx.shared.tidegate_ptr

local byte = string.byte
local exit = ngx.exit
local exiting = ngx.worker.exiting
local get_last_failure = balancer.get_last_failure
local floor = math.floor
local holds = ejections.holds
local huge = math.huge
local ipairs = ipairs
local log = math.log
local md5_bin = ngx.md5_bin
local min = math.min
local ngx = ngx
local now = ngx.now
local pairs = pairs
local pcall = pcall
local random = math.random
local set_current_peer = balancer.set_current_peer
local set_more_tries = balancer.set_more_tries
local set_timeouts = balancer.set_timeouts
local sleep = ngx.sleep
local sub = string.sub
local timer_every = ngx.timer.every
local tonumber = tonumber
local var = ngx.var

local ERROR = ngx.ERROR
local GOLDEN = 0.6180339887498949
local MAX_TRIES = 5
local DRAIN_GRACE = 1.5     -- a task gets its SIGTERM 2 to 3 s after it is seen draining
local REFUSING_LIMIT = 3    -- seconds to wait while peers are up that all refuse

local _M = {}

local known = {}            -- upstream name → what this worker has made of its version
local ejected = {}          -- "address:port" → what `ejections` keeps, in this worker
local connections = {}      -- "address:port" → connections of this worker that are open
local held, max_held = 0, 4096
local direct = false


-- Peers that are picked from, with the sums of their weights.
local function group_of(peers, indexes)
    local sums, total, uniform = {}, 0, true
    for place, index in ipairs(indexes) do
        local weight = peers[index].weight
        total = total + weight
        sums[place] = total
        uniform = uniform and weight == peers[indexes[1]].weight
    end
    return { indexes = indexes, sums = sums, total = total, uniform = uniform }
end


-- The place in the group whose turn it is: one after the other, or where weights differ a cursor
-- that advances by the golden ratio over the line of their sums.
local function next_place(group, turn)
    if group.uniform then
        turn.cursor = (turn.cursor + 1) % #group.indexes
        return turn.cursor + 1
    end
    turn.position = (turn.position + GOLDEN) % 1
    local target, sums = turn.position * group.total, group.sums
    local low, high = 1, #sums
    while low < high do
        local middle = floor((low + high) / 2)
        if sums[middle] > target then
            high = middle
        else
            low = middle + 1
        end
    end
    return low
end


-- Methods: the index of a possible peer of a group, nil if there is none.
local function by_turns(upstream, group, possible)
    local indexes = group.indexes
    for _ = 1, min(#indexes, 16) do
        local index = indexes[next_place(group, upstream.turn)]
        if possible(index) then
            return index
        end
    end
    local start = random(0, #indexes)
    for step = 1, #indexes do
        local index = indexes[(start + step) % #indexes + 1]
        if possible(index) then
            return index
        end
    end
    return nil
end


-- The possible peer with the highest score; of equal ones any.
local function best(group, possible, score)
    local found, highest = nil, -huge
    local indexes = group.indexes
    local start = random(0, #indexes)
    for step = 1, #indexes do
        local index = indexes[(start + step) % #indexes + 1]
        if possible(index) then
            local value = score(index)
            if value > highest then
                found, highest = index, value
            end
        end
    end
    return found
end


local function key_of(upstream, index)
    local key = upstream.keys[index]
    if not key then
        local peer = upstream.peers[index]
        local host = codec.host(peer.family, peer.address)
        key = host .. ":" .. peer.port
        upstream.hosts[index], upstream.keys[index] = host, key
    end
    return key
end


local function fewest(upstream, group, possible)
    return best(group, possible, function(index)
        return -((connections[key_of(upstream, index)] or 0) + 1) / upstream.peers[index].weight
    end)
end


-- Rendezvous hashing: a peer that comes or goes moves its own share of the clients and no other.
-- It looks at each peer, so it is not for thousands of them; a CRC would not mix well enough.
local function by_client(upstream, group, possible)
    local client = var.proxy_protocol_addr
    client = client and client ~= "" and client or var.remote_addr
    return best(group, possible, function(index)
        local a, b, c, d = byte(md5_bin(client .. key_of(upstream, index)), 1, 4)
        local point = (((a * 256 + b) * 256 + c) * 256 + d + 1) / 4294967297
        return upstream.peers[index].weight / -log(point)
    end)
end


local function in_order(_, group, possible)
    for _, index in ipairs(group.indexes) do
        if possible(index) then
            return index
        end
    end
    return nil
end


-- Of what a policy can ask for, what makes sense where no request is seen.
local function method_of(policy)
    if policy.sticky and policy.sticky.kind == "ip"
            or policy.algorithm == "hash" and policy.hash_key == "ip" then
        return by_client
    end
    return policy.algorithm == "least_conn" and fewest
        or policy.algorithm == "first" and in_order
        or by_turns
end


local function open(blob, number, before)
    local head, peers = codec.head(blob), codec.peers(blob)
    local policy = policies.parse(codec.policy(blob, head))
    local regular, backups = {}, {}
    for index = 0, head.up - 1 do
        local list = peers[index].backup == 1 and backups or regular
        list[#list + 1] = index
    end
    return {
        number = number,
        blob = blob,        -- keeps the records alive
        peers = peers,
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        hold = head.hold,
        groups = { group_of(peers, regular), group_of(peers, backups) },
        turn = before and before.turn or { cursor = random(0, 65535), position = random() },
        timeouts = policy.timeouts,
        method = method_of(policy),
        hosts = {},
        keys = {},
    }
end


-- The current version of upstream `name`, packed, and its number; see `tidegate.store`.
local function read(name)
    for _ = 1, 5 do
        local number = ptr:get(name)
        if not number or number == 0 then
            return nil
        end
        local blob = dat:get("\1" .. name .. "\1" .. number)
        if blob then
            return blob, number
        end
    end
    return nil
end


local function lookup(name)
    local number, upstream = ptr:get(name), known[name]
    if upstream and upstream.number == number then
        return upstream
    end
    local blob
    blob, number = read(name)
    upstream = blob and open(blob, number, upstream) or nil
    known[name] = upstream
    return upstream
end


local function is_ejected(upstream, index, at)
    return holds(ejected[key_of(upstream, index)], at, upstream.peers[index].since)
end


-- A peer by rank: up; backup; draining, which where a replacement is expected may be gone already;
-- being probed, where nothing else is to be hoped for. `fresh` leaves out those that failed.
local function choose(upstream, tried, fresh)
    local at, peers = now(), upstream.peers
    local function possible(index)
        return not (tried and tried[key_of(upstream, index)])
            and not (fresh and is_ejected(upstream, index, at))
    end
    local index
    for _, group in ipairs(upstream.groups) do
        index = index or #group.indexes > 0 and upstream.method(upstream, group, possible) or nil
    end
    local function find_other(first, count, not_before)
        local start = random(0, count)
        for step = 0, count - 1 do
            local other = first + (start + step) % count
            if peers[other].since > not_before and possible(other) then
                return other
            end
        end
        return nil
    end
    if not index and upstream.draining > 0 then
        index = find_other(upstream.up, upstream.draining,
                           upstream.hold > 0 and at - DRAIN_GRACE or 0)
    end
    if not index and upstream.probing > 0 and upstream.hold == 0 then
        index = find_other(upstream.up + upstream.draining, upstream.probing, 0)
    end
    return index
end


-- Counts a connection to a peer (1), or its end (-1).
local function attached(key, change)
    local count = (connections[key] or 0) + change
    connections[key] = count > 0 and count or nil
end


local function wait(name, started)
    while true do
        local upstream = lookup(name)
        if not upstream or upstream.hold == 0 then
            return false
        end
        if choose(upstream, nil, true) then
            return true
        end
        local limit = upstream.up > 0 and min(upstream.hold, REFUSING_LIMIT) or upstream.hold
        if now() - started >= limit or exiting() then
            return false
        end
        sleep(0.003 + held * 0.00003)
    end
end


--- Body of `preread_by_lua`: a connection that finds no peer waits for one, if one is expected.
function _M.hold()
    local name = var.tidegate_upstream
    if name == "" then
        -- Known only now, when the name that the client asks for has been read.
        name = var.tidegate_passthrough
        var.tidegate_upstream = name
    end
    local upstream = lookup(name)
    if not upstream or upstream.hold == 0 or choose(upstream, nil, true) then
        return
    end
    if held >= max_held then
        counters.add(name, counters.HELD_REFUSED)
        return
    end
    held = held + 1
    local ok, found = pcall(wait, name, now())
    held = held - 1
    counters.add(name, ok and found and counters.HELD_RESUMED or counters.HELD_EXPIRED)
end


local function note_failure(name, state)
    ejections.add(ejected, state.key)
    attached(state.key, -1)
    counters.add(name, counters.CONNECT_FAILURES)
    state.tried[state.key] = true
    state.key = nil
end


local function seconds(value)
    return value > 0 and value or nil
end


--- Body of `balancer_by_lua` of the stream part.
function _M.balance()
    local name, ctx = var.tidegate_upstream, ngx.ctx
    local state = ctx.tidegate
    local upstream = lookup(name)
    if not state then
        state = { tried = {} }
        ctx.tidegate = state
    elseif get_last_failure() and state.key then
        note_failure(name, state)
    end
    local tried = state.tried
    local index = upstream and (choose(upstream, tried, true) or choose(upstream, tried, false))
    if not index then
        return exit(ERROR)
    end
    if not state.begun then
        state.begun = true
        counters.opened(name, 1)
        -- The placeholder of the configuration is down and counts for none.
        local tries = upstream.up + upstream.draining + upstream.probing
        if tries > 1 then
            set_more_tries(min(tries, MAX_TRIES))
        end
    end
    local times = upstream.timeouts
    if times.connect > 0 or times.send > 0 or times.read > 0 then
        set_timeouts(seconds(times.connect), seconds(times.send), seconds(times.read))
    end
    local key = key_of(upstream, index)
    local ok, err = set_current_peer(upstream.hosts[index], upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: upstream ", name, ": ", err)
        return exit(ERROR)
    end
    state.key = key
    attached(key, 1)
end


local function exists(name)
    return (ptr:get(name) or 0) ~= 0
end


--- Body of `log_by_lua`: a connection has ended.
function _M.log()
    local name = var.tidegate_upstream
    if not name or name == "" then
        return
    end
    local state = ngx.ctx.tidegate
    local result = counters.NO_PEER
    if state and state.begun then
        counters.opened(name, -1)
        -- What came of the last peer that was tried the balancer is not told.
        local connected = sub(var.upstream_connect_time or "-", -1) ~= "-"
        result = connected and counters.OK or counters.FAILED
        if state.key and not connected then
            note_failure(name, state)
        elseif state.key then
            attached(state.key, -1)
        end
        counters.add(name, counters.RECEIVED, tonumber(var.bytes_received))
        counters.add(name, counters.SENT, tonumber(var.bytes_sent))
    end
    counters.add(name, result)
    if direct then
        counters.flush(exists)
    end
end


local function tick(premature)
    direct = direct or premature
    local ok, err = pcall(counters.flush, exists)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: counting connections: ", err)
    end
end


local function sweep(premature)
    if premature then
        return
    end
    ejections.sweep(ejected)
    for name in pairs(known) do
        if not exists(name) then
            known[name] = nil
        end
    end
end


--- Starts what runs beside the connections.
-- @param limit connections that may wait for a peer at a time, in this worker
function _M.start(limit)
    max_held = limit
    timer_every(1, tick)
    timer_every(30, sweep)
end


return _M
