--- Picks the peer for a request: all that Tidegate does on the path of every request.
--
-- Why: one read of the upstream's name, one of the number of the newest change; all else is this
-- worker's own memory until that changes. Which peer it is says `tidegate.selection`, which ones
-- can be sent to `tidegate.health`. Nothing here waits; a request that finds no peer fails over to
-- `tidegate.hold`.

local attempts = require "tidegate.attempts"
local balancer = require "ngx.balancer"
local canaries = require "tidegate.canary"
local circuit = require "tidegate.circuit"
local codec = require "tidegate.codec"
local ffi = require "ffi"
local get_request = require("resty.core.base").get_request
local health = require "tidegate.health"
local load = require "tidegate.load"
local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"
local policies = require "tidegate.policy"
local queue = require "tidegate.queue"
local retry = require "tidegate.retry"
local selection = require "tidegate.selection"
local signal = require "tidegate.signal"
local sticky = require "tidegate.sticky"
local store = require "tidegate.store"

local ptr = ngx.shared.tidegate_ptr

local begin = metrics.begin
local calm = health.calm
local cast = ffi.cast
local collect = collectgarbage
local exit = ngx.exit
local get_last_failure = balancer.get_last_failure
local host_of = peers.host
local look = health.look
local match = string.match
local newest_change = signal.newest
local ngx = ngx
local note_end = health.note_end
local now = ngx.now
local select_peer = selection.select
local set_current_peer = balancer.set_current_peer
local set_more_tries = balancer.set_more_tries
local set_timeouts = balancer.set_timeouts
local tonumber = tonumber
local uintptr = ffi.typeof("uintptr_t")
local var = ngx.var

local FULL = selection.FULL
local NO_OTHER_PEER = attempts.NO_OTHER_PEER
local NO_PEER = attempts.NO_PEER

local _M = {}

-- Upstream name → what this worker has made of its version. Each takes some kB, so that not all of
-- thousands are kept: a full table becomes the older one, from which comes back what is asked for.
local ROOM = 500
-- What the collector is told to do per version that is opened, in kB: more than that takes, so that
-- what was forgotten is gone before it adds up to much.
local STEP = 8
local known, older, count = {}, {}, 0
local origins = {}          -- request that went to a canary → name of the upstream it came from


-- What the worker needs of a version; `blob` keeps the records alive.
local function open(name, blob, number, before)
    local head = codec.head(blob)
    local candidates = head.up + head.draining
    if head.hold == 0 then
        candidates = candidates + head.probing
    end
    local policy = policies.parse(codec.policy(blob, head))
    local upstream = {
        name = name,
        number = number,
        blob = blob,
        head = head,
        peers = codec.peers(blob),
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        hold = head.hold,
        uniform = head.uniform == 1,
        policy = policy,
        hosts = {},
        stats = metrics.of(name),
        canary = policy.canary and canaries.new(policy.canary, before and before.canary or nil),
    }
    local timeouts = policy.timeouts
    upstream.timeouts = timeouts.connect + timeouts.send + timeouts.read > 0 and timeouts
    selection.open(upstream, before)
    health.open(upstream)
    retry.open(upstream, before, candidates)
    upstream.special = upstream.timeouts or upstream.budget or upstream.retry_led
    return upstream
end


local function age()
    known, older, count = {}, known, 0
end


local function keep(name, upstream)
    if not known[name] then
        if count == ROOM then
            age()
        end
        count = count + 1
    end
    known[name] = upstream
end


-- What this worker has made of upstream `name`, as far as it has kept that.
local function recall(name)
    local upstream = known[name]
    if not upstream then
        upstream = older[name]
        if upstream then
            keep(name, upstream)
        end
    end
    return upstream
end


local function refresh(name, before)
    local blob, number = store.get(name)
    if not blob then
        known[name], older[name] = nil, nil
        return nil
    end
    collect("step", STEP)
    local upstream = open(name, blob, number, before)
    keep(name, upstream)
    return upstream
end


--- Upstream `name` as it is now, with what is known of its peers' health; nil where there is none.
function _M.lookup(name)
    local upstream, newest = recall(name), newest_change()
    if upstream and upstream.seen == newest then
        return upstream
    end
    if not upstream or upstream.number ~= ptr:get(name) then
        upstream = refresh(name, upstream)
    end
    if upstream then
        upstream.seen = look(upstream) and newest
    end
    return upstream
end


local lookup = _M.lookup


--- Whether no admitted peer is left that can be sent to. It takes nobody's turn, so that it may be
-- asked before each request.
function _M.is_exhausted(upstream)
    if upstream.up > 0 and calm(upstream) then
        return false
    end
    local at = now()
    for index = 0, upstream.up - 1 do
        if health.usable(upstream, index, at) then
            return false
        end
    end
    return true
end


--- Forgets upstreams that nobody has asked for since the call before the last one.
_M.sweep = age


local function current()
    return tonumber(cast(uintptr, get_request()))
end


-- The canary of `upstream`, if the request is to go there; a session stays where it is.
local function canary_for(upstream)
    local canary = upstream.canary
    local wanted = canaries.asked(canary)
    if wanted == false or wanted == nil and selection.knows(upstream) then
        return nil
    end
    local other = lookup(canary.upstream)
    if not other or other.up == 0 then
        return nil
    end
    if wanted or selection.knows(other)
            or canaries.turn(canary, upstream.ring and upstream.ring.key()) then
        return other
    end
    return nil
end


-- Whether the circuit of `upstream` lets this request through.
local function admit(upstream)
    if not upstream.open_until or var.tidegate_trial == upstream.name then
        return true
    end
    local may, trial = circuit.admit(upstream)
    if trial then
        var.tidegate_trial = upstream.name
    end
    return may
end


-- The request that tries the circuit of `upstream`, if this is it, goes elsewhere.
-- @param failed as for `circuit.tried`
local function end_trial(upstream, failed)
    if upstream.open_until and var.tidegate_trial == upstream.name then
        circuit.tried(upstream, failed)
        var.tidegate_trial = ""
    end
end


-- The peer for a request to an upstream whose policy asks for more than a turn.
-- @param tried as for `selection.select`
-- @return upstream (the canary, where it goes there), index or nil, and why there is none
local function choose(upstream, tried)
    if upstream.counted then
        local before, index = queue.admitted()
        if before then
            return before, admit(before) and index or nil, "open"
        end
    end
    local canary = upstream.canary and canary_for(upstream)
    if canary and admit(canary) then
        local index = select_peer(canary, tried, true)
        if index then
            origins[current()] = upstream.name
            canary.stats.ended = true
            var.tidegate_upstream = canary.name
            begin(canary.stats)
            return canary, index
        end
        end_trial(canary)
    end
    if not admit(upstream) then
        return upstream, nil, "open"
    elseif upstream.queue > 0 and queue.busy(upstream) then
        return upstream, nil, FULL
    end
    return upstream, select_peer(upstream, tried)
end


-- A canary's request that failed there goes back to where it came from.
-- @return that upstream, or nil
local function go_back()
    local request = current()
    local name = origins[request]
    if not name then
        return nil
    end
    origins[request] = nil
    local canary = recall(var.tidegate_upstream)
    if canary then
        end_trial(canary, true)
    end
    var.tidegate_upstream = name
    return lookup(name)
end


-- The peer for a request that has failed.
local function choose_again(name, upstream)
    local made, again = attempts.read(), var.tidegate_again
    health.note_failure(name, upstream, made)
    local stats = upstream and upstream.stats
    if stats and stats.ended then
        load.finish(true)
        queue.wake(name)
    end
    local asked = upstream or go_back()
    if not asked or not retry.allowed(asked, made, again ~= "") then
        return nil
    end
    look(asked)
    local tried = attempts.tried(made, again == "retry" and 1 or made.first,
                                 tonumber(var.tidegate_failed_at) or 0)
    local index, why = select_peer(asked, tried)
    local origin = not index and go_back()
    if origin then
        asked = origin
        index, why = select_peer(asked, tried)
    end
    if not index then
        if why == FULL and asked.queue > 0 then
            var.tidegate_no_peer = FULL
        end
        return nil
    end
    if asked ~= upstream then
        begin(asked.stats)
        if asked.tries then
            set_more_tries(asked.tries)
        end
    end
    retry.note(name)
    return asked, index
end


-- What a policy has nginx do, at the first peer of a request or the first one after `hold`.
-- @param spare upstream whose turn it is when all the canary's peers have failed; nil for none
local function instruct(upstream, again, spare)
    if upstream.budget and again ~= "held" and again ~= "retry" then
        retry.count(upstream)
    end
    local timeouts = upstream.timeouts
    if timeouts then
        set_timeouts(timeouts.connect > 0 and timeouts.connect or nil,
                     timeouts.send > 0 and timeouts.send or nil,
                     timeouts.read > 0 and timeouts.read or nil)
    end
    retry.grant(upstream, again ~= "", spare)
end


-- The first peer for a request that is no plain one: its upstream's policy asks for more, some
-- peers are to be left alone, or it comes from `hold`.
-- @return upstream, index or nil, and why there is none
local function choose_first(upstream, before)
    local again = before and var.tidegate_again or ""
    if again == "" and retry.heeds_answers(upstream) and var.tidegate_streamed ~= "1" then
        return upstream, nil, "led"
    end
    local tried
    if again ~= "" then
        local made = attempts.read()
        if again == "held" then
            health.mark_refused(upstream, made)
        end
        tried = attempts.tried(made, again == "retry" and 1 or #made + 1,
                               tonumber(var.tidegate_failed_at) or now())
    end
    local chosen, index, why = choose(upstream, tried)
    if index then
        instruct(chosen, again, chosen.name ~= upstream.name and upstream or nil)
    end
    return chosen, index, why
end


--- Body of `balancer_by_lua`.
--
-- Where there is no peer nginx has to make a 502 of it, which `hold` sorts out; see `attempts`.
function _M.balance()
    local name = var.tidegate_upstream
    local upstream = lookup(name)
    local index
    if get_last_failure() then
        upstream, index = choose_again(name, upstream)
        if not index then
            return exit(NO_OTHER_PEER)
        end
    else
        local why
        if upstream then
            local before = begin(upstream.stats)
            if calm(upstream) and upstream.plain and not upstream.special and not before
                    and not upstream.open_until then
                index = upstream.picker:next()
                if upstream.tries then
                    set_more_tries(upstream.tries)
                end
            else
                upstream, index, why = choose_first(upstream, before)
            end
        end
        if not index then
            var.tidegate_no_peer = why or "none"
            return exit(NO_PEER)
        end
    end
    local ok, err = set_current_peer(upstream.hosts[index] or host_of(upstream, index),
                                     upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: upstream ", name, ": ", err)
        return exit(NO_OTHER_PEER)
    end
end


--- Takes note that no peer of upstream `name` has answered the current request.
-- @return name of the upstream that it belongs to: of a canary's request, where it came from
function _M.give_up(name)
    local upstream = recall(name)
    if not upstream then
        return name
    end
    if upstream.session then
        sticky.unset(upstream)
    end
    if upstream.stats.ended then
        load.finish(true)
        queue.wake(name)
        local origin = go_back()
        return origin and origin.name or name
    end
    return name
end


-- Seconds until the head of the answer; nil if there was none.
local function header_time()
    return tonumber(match(var.upstream_header_time or "", "[%d.]+$"))
end


--- Body of `log_by_lua`: takes note of the end of a request.
function _M.log()
    local stats = metrics.log()
    local upstream = recall(stats.name) or stats.name ~= "" and lookup(stats.name)
    if upstream then
        note_end(upstream, ngx.status)
    end
    if stats.ended then
        load.finish(false, header_time)
        queue.forget()
        origins[current()] = nil
        queue.wake(stats.name)
    end
end


return _M
