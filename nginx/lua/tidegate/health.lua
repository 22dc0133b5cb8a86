--- Which peers this worker keeps away from, and what it makes of requests that fail.
--
-- Why: choosing a peer asks two questions of this module, `usable` and `possible`, and nothing
-- else; what makes a peer unusable is decided here. Two things do. A peer that has not accepted a
-- connection is left alone by this worker at once, for a short time. What `records` has, ejections
-- and checks, counts in all workers, unless too many peers would be out. Must not choose anything.

local attempts = require "tidegate.attempts"
local circuit = require "tidegate.circuit"
local ejections = require "tidegate.ejections"
local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"
local records = require "tidegate.records"
local retry = require "tidegate.retry"

local holds = ejections.holds
local ipairs = ipairs
local key_of = peers.key
local next = next
local now = ngx.now
local pairs = pairs
local var = ngx.var

local NEW = 10      -- seconds in which a peer may not listen yet behind what accepts for it
local FAILED = { [502] = true, [503] = true, [504] = true }

local _M = {}

-- upstream name → "address:port" → what `ejections` keeps, in this worker. Per upstream, as a peer
-- whose certificate one route does not take may be fine with another.
local ejected = {}


--- Adds what this module keeps with an opened version.
function _M.open(upstream)
    upstream.found = {}
    records.open(upstream)
end


--- Whether all peers of `upstream` are usable, as far as this worker has looked.
function _M.calm(upstream)
    local health = upstream.health
    return not health.ejected and not health.unhealthy and not ejected[upstream.name]
end


--- Looks for news of `upstream`; see `records.look`.
_M.look = records.look


--- Whether a peer may be sent to at all: also when no other one is usable.
function _M.possible(upstream, index)
    local unhealthy = upstream.health.unhealthy
    return not (unhealthy and unhealthy[index])
end


--- Whether a peer may be sent to at time `at`.
function _M.usable(upstream, index, at)
    local health = upstream.health
    if health.ejected and health.ejected[index] or health.unhealthy and health.unhealthy[index] then
        return false
    end
    local of = ejected[upstream.name]
    local ejection = of and of[key_of(upstream, index)]
    return not holds(ejection, at, upstream.peers[index].since)
end


local function eject(name, key)
    local of = ejected[name] or {}
    ejected[name] = of
    ejections.add(of, key)
end


--- Forgets ejections that are long over.
function _M.sweep()
    for name, of in pairs(ejected) do
        ejections.sweep(of)
        if not next(of) then
            ejected[name] = nil
        end
    end
end


-- Whether an attempt met what accepts connections for a peer that does not listen yet, and closes
-- them without a word: so does Docker's proxy of a published port while a container starts. Where
-- there are other peers, one that has seen a request never gets it again.
local function met_a_stand_in(upstream, attempt, at)
    if upstream.up ~= 1 or attempt.answered or attempt.received > 0 or attempt.status ~= 502 then
        return false
    end
    local index = peers.find(upstream, attempt.address)
    return index ~= nil and at - upstream.peers[index].since < NEW
end


--- Sets `refused` of those attempts that have reached no application.
-- @param upstream as it is now, nil if it is gone
-- @param made as `attempts.read` gives it
function _M.mark_refused(upstream, made)
    local at = now()
    for _, attempt in ipairs(made) do
        attempt.refused = not attempt.connected
            or upstream ~= nil and met_a_stand_in(upstream, attempt, at)
    end
end


local mark_refused = _M.mark_refused


local function blame(upstream, attempt)
    local index = upstream and peers.find(upstream, attempt.address)
    if index then
        records.failed(upstream, index)
    end
end


--- Takes note of the last attempt of this request, which has failed.
-- @param name of the upstream
-- @param upstream as it is now, nil if it is gone
-- @param made as `attempts.read` gives it
function _M.note_failure(name, upstream, made)
    local last = made[#made]
    if not last then
        return
    end
    mark_refused(upstream, made)
    if last.refused then
        eject(name, last.address)
    end
    if not last.connected then
        metrics.add(name, metrics.CONNECT_FAILURES)
    end
    if not last.answered or FAILED[last.status] then
        blame(upstream, last)
    end
end


-- What the circuit makes of a request: true if it has failed, nil if that says nothing.
local function verdict(status, made)
    if status == 499 or status >= 500 and #made == 0 then
        return nil
    end
    return status >= 500
end


--- Takes note of the end of a request to `upstream`, answered with `status`. Whatever failed
-- without an answer of a peer has been noted before.
function _M.note_end(upstream, status)
    local policy, suspects = upstream.policy, upstream.health.suspects
    if status < 500 and not suspects and not policy.circuit and retry.pending == 0 then
        return
    end
    local made = (status >= 500 or suspects) and attempts.read() or {}
    local last = made[#made]
    if last and last.answered and not made.asked then
        local index = peers.find(upstream, last.address)
        if FAILED[last.status] then
            blame(upstream, last)
        elseif index and suspects and suspects[index] and last.status < 500 then
            records.succeeded(upstream, index)
        end
    end
    if retry.pending > 0 and var.tidegate_retried == "1" then
        retry.pending = retry.pending - 1
        metrics.add(upstream.name, status < 500 and metrics.RETRIED_OK or metrics.RETRIED_FAILED)
    end
    if policy.circuit then
        local failed = verdict(status, made)
        if var.tidegate_trial == upstream.name then
            circuit.tried(upstream, failed)
        elseif failed ~= nil and not upstream.open_until then
            circuit.count(upstream, failed)
        end
    end
end


return _M
