--- Picks the peer for a request: all that Tidegate does on the path of every request.
--
-- Why: one read of the upstream's name, one of its version number; all else is this worker's own
-- memory until that number changes. Which peer it is says `tidegate.selection`, which ones can be
-- sent to `tidegate.health`. Nothing here waits; a request that finds no peer fails over to
-- `tidegate.hold`.

local attempts = require "tidegate.attempts"
local balancer = require "ngx.balancer"
local circuit = require "tidegate.circuit"
local codec = require "tidegate.codec"
local health = require "tidegate.health"
local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"
local policies = require "tidegate.policy"
local retry = require "tidegate.retry"
local selection = require "tidegate.selection"
local store = require "tidegate.store"

local ptr = ngx.shared.tidegate_ptr

local begin = metrics.begin
local exit = ngx.exit
local get_last_failure = balancer.get_last_failure
local host_of = peers.host
local ngx = ngx
local note_end = health.note_end
local now = ngx.now
local pairs = pairs
local quiet = health.quiet
local select_peer = selection.select
local set_current_peer = balancer.set_current_peer
local set_more_tries = balancer.set_more_tries
local set_timeouts = balancer.set_timeouts
local tonumber = tonumber
local var = ngx.var

local ERROR = ngx.ERROR

local _M = {}

local known = {}            -- upstream name → what this worker has made of its version


-- What the worker needs of a version; `blob` keeps the records alive.
local function open(name, blob, number, before)
    local head = codec.head(blob)
    local candidates = head.up + head.draining
    if head.hold == 0 then
        candidates = candidates + head.probing
    end
    local upstream = {
        name = name,
        number = number,
        blob = blob,
        count = head.count,
        peers = codec.peers(blob),
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        hold = head.hold,
        uniform = head.uniform == 1,
        total_weight = head.total_weight,
        policy = policies.parse(codec.policy(blob, head)),
        hosts = {},
        stats = metrics.of(name),
    }
    local timeouts = upstream.policy.timeouts
    upstream.timeouts = timeouts.connect + timeouts.send + timeouts.read > 0 and timeouts
    selection.open(upstream, before)
    health.open(upstream)
    retry.open(upstream, before, candidates)
    upstream.special = upstream.timeouts or upstream.budget or upstream.retry_led
    return upstream
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


--- Forgets upstreams that are gone.
function _M.sweep()
    for name in pairs(known) do
        if not store.number(name) then
            known[name] = nil
        end
    end
end


-- What only a policy asks for, at the first peer of a request.
-- @return nil, or why this is to go to `tidegate.hold` instead
local function prepare(upstream)
    local led = var.tidegate_again ~= ""
    if upstream.budget and not led then
        retry.count(upstream)
    end
    if upstream.retry_led and not led then
        return "led"
    end
    local timeouts = upstream.timeouts
    if timeouts then
        set_timeouts(timeouts.connect > 0 and timeouts.connect or nil,
                     timeouts.send > 0 and timeouts.send or nil,
                     timeouts.read > 0 and timeouts.read or nil)
    end
    retry.grant(upstream, led)
    return nil
end


-- Whether the open circuit of `upstream` lets this request through.
local function admit(upstream)
    if var.tidegate_trial == "1" then
        return true
    end
    local may, trial = circuit.admit(upstream)
    if trial then
        var.tidegate_trial = "1"
    end
    return may
end


-- The peer for a request that a peer has failed.
local function next_peer(name, upstream)
    local made = attempts.read()
    health.note_failure(name, upstream, made)
    local index
    if upstream then
        health.quiet(upstream)
        local again = var.tidegate_again
        if retry.allowed(upstream, made, again ~= "") then
            index = select_peer(upstream, attempts.tried(made, again == "retry" and 1 or made.first,
                                                         tonumber(var.tidegate_failed_at) or 0))
        end
    end
    if index then
        retry.note(upstream)
    end
    return index
end


-- The first peer for a request.
local function first_peer(upstream)
    local before = begin(upstream.stats) and var.tidegate_again ~= ""
    local calm = quiet(upstream)
    local why = upstream.open_until and not admit(upstream) and "open"
        or upstream.special and prepare(upstream)
    if why then
        -- Debian's build has no way to answer 503 from here; `hold` sorts it out.
        var.tidegate_no_peer = why
        return nil
    end
    local index
    if before then
        -- It comes from `hold`.
        local made = attempts.read()
        local first = var.tidegate_again == "retry" and 1 or #made + 1
        index = select_peer(upstream, attempts.tried(made, first,
                                                     tonumber(var.tidegate_failed_at) or now()))
    elseif upstream.up > 0 and calm then
        index = upstream.picker:next()
    else
        index = select_peer(upstream)
    end
    if not index then
        var.tidegate_no_peer = "none"
    elseif upstream.tries and not upstream.special and not before then
        set_more_tries(upstream.tries)
    end
    return index
end


--- Body of `balancer_by_lua`.
function _M.balance()
    local name = var.tidegate_upstream
    local upstream = lookup(name)
    local index
    if get_last_failure() then
        index = next_peer(name, upstream)
    elseif upstream then
        index = first_peer(upstream)
    else
        var.tidegate_no_peer = "none"
    end
    if not index then
        return exit(ERROR)
    end
    local ok, err = set_current_peer(upstream.hosts[index] or host_of(upstream, index),
                                     upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: upstream ", name, ": ", err)
        return exit(ERROR)
    end
end


--- Body of `log_by_lua`: takes note of the end of a request.
function _M.log()
    local upstream = known[metrics.log()]
    if upstream then
        note_end(upstream, ngx.status)
    end
end


return _M
