--- What all workers know of peers that fail: failures, ejections, verdicts of checks.
--
-- Why: what one worker learns of a peer by a failed request (passive) or by a check (active) must
-- count in all of them and survive each change of the membership. So it lies in a shared dict, in
-- small records under upstream and peer id, never under an index. Records expire by themselves:
-- peers that are gone leave nothing behind. `signal` tells workers when to read them again.
-- Must not choose anything.

local circuit = require "tidegate.circuit"
local codec = require "tidegate.codec"
local ffi = require "ffi"
local metrics = require "tidegate.metrics"
local signal = require "tidegate.signal"

local dict = ngx.shared.tidegate_health

local copy = ffi.copy
local ffi_string = ffi.string
local max = math.max
local min = math.min
local next = next
local ngx = ngx
local now = ngx.now

ffi.cdef [[
typedef struct {
    double at;             /* Unix time at which it began */
    double until_;
    double length;         /* seconds */
    uint32_t count;        /* ejections in a row, this one included */
} tidegate_ejection_t;

typedef struct {
    double at;             /* Unix time of the last check */
    double valid;          /* until when it says anything */
    double since;          /* Unix time of the verdict */
    uint16_t status;       /* of the answer; 0: none */
    uint8_t healthy;
    uint8_t streak;        /* results in a row that speak against the verdict */
} tidegate_verdict_t;
]]

local ejection_type = ffi.typeof("tidegate_ejection_t")
local verdict_type = ffi.typeof("tidegate_verdict_t")
local EJECTION_SIZE = ffi.sizeof("tidegate_ejection_t")
local VERDICT_SIZE = ffi.sizeof("tidegate_verdict_t")

local FAILURES = "f\1"
local EJECTION = "e\1"
local VERDICT = "c\1"
local MESSAGE = "m\1"
local RIGHT = "x\1"         -- to eject a peer: one worker at a time
local FAILURES_TTL = 600
local REFUSED_TTL = 60
local FORGIVEN = 30         -- seconds back after which the length of ejections starts anew
local LARGE = 200           -- peers from which on reading all records takes its time
local SHARE = 20e-6         -- seconds per peer between two readings of a large upstream

local _M = {}


--- Key of a peer's records.
function _M.key(name, id)
    return name .. "\1" .. id
end


local key_for = _M.key


local function key_of(upstream, index)
    local keys = upstream.health.keys
    local key = keys[index]
    if not key then
        key = key_for(upstream.name, codec.id(upstream.blob, upstream.head.count, index))
        keys[index] = key
    end
    return key
end


local function read(prefix, key, kind, size)
    local text = dict:get(prefix .. key)
    if not text or #text ~= size then
        return nil
    end
    local record = kind()
    copy(record, text, size)
    return record
end


local function ejection_of(key, since, at)
    local ejection = read(EJECTION, key, ejection_type, EJECTION_SIZE)
    return ejection and at < ejection.until_ and since <= ejection.at and ejection or nil
end


local function verdict_of(key, since, at)
    local verdict = read(VERDICT, key, verdict_type, VERDICT_SIZE)
    return verdict and at < verdict.valid and since <= verdict.at and verdict or nil
end


--- Adds what this module keeps with an opened version. Nothing is known until it is looked at.
function _M.open(upstream)
    upstream.health = {
        word = false,
        word_key = signal.key(upstream.name),
        keys = {},
        loaded = 0,
        next_load = nil,    -- when something that is known now ends
        ejected = nil,      -- index → true, to be asked last
        unhealthy = nil,    -- index → true, not to be asked
        suspects = nil,     -- index → true: has failures that a success has to take back
    }
end


-- Reads all records of `upstream`.
local function load(upstream, word, at)
    local health, peers, policy = upstream.health, upstream.peers, upstream.policy
    local passive, check = policy.passive.failures > 0, policy.check
    local ejected, unhealthy, suspects, next_load = {}, {}, {}, nil
    local all, well, spares, spare = 0, 0, 0, 0
    for index = 0, upstream.up + upstream.draining - 1 do
        local key, peer = key_of(upstream, index), peers[index]
        local is_out = false
        if passive then
            suspects[index] = dict:get(FAILURES .. key) and true or nil
            local ejection = ejection_of(key, peer.since, at)
            if ejection then
                ejected[index], is_out = true, true
                next_load = min(next_load or ejection.until_, ejection.until_)
            end
        end
        if check then
            local verdict = verdict_of(key, peer.since, at)
            if verdict and verdict.healthy == 0 then
                unhealthy[index], is_out = true, true
                next_load = min(next_load or verdict.valid, verdict.valid)
            end
        end
        if index < upstream.up then
            if peer.backup == 1 then
                spares = spares + 1
                spare = spare + (is_out and 0 or 1)
            else
                all = all + 1
                well = well + (is_out and 0 or 1)
            end
        end
    end
    health.word = word
    health.loaded = at
    health.next_load = next_load
    health.suspects = next(suspects) and suspects
    if all == 0 then
        all, well, spare = spares, spare, 0
    end
    -- Backup peers are there for this very case: as long as one of them is well, no panic.
    local panic = spare == 0 and well < policy.panic * all
    health.ejected = not panic and next(ejected) and ejected or nil
    health.unhealthy = not panic and next(unhealthy) and unhealthy or nil
    circuit.load(upstream)
end


--- Looks whether there is news of `upstream`.
-- @return whether all is known until `signal` says otherwise; if not, the next request has to look
--   again
function _M.look(upstream)
    local health = upstream.health
    local word = dict:get(health.word_key) or false
    if word ~= health.word or health.next_load then
        local at = now()
        if word ~= health.word
                and (upstream.up < LARGE or at - health.loaded > upstream.up * SHARE)
                or health.next_load and at >= health.next_load then
            load(upstream, word, at)
        end
    end
    return word == health.word and not health.next_load
end


-- Whether another peer than `index` could still do the work of all.
local function has_others(upstream, index, at)
    local peers = upstream.peers
    for other = 0, upstream.up - 1 do
        if other ~= index then
            local key, since = key_of(upstream, other), peers[other].since
            local verdict = upstream.policy.check and verdict_of(key, since, at)
            if not ejection_of(key, since, at) and (not verdict or verdict.healthy == 1) then
                return true
            end
        end
    end
    return false
end


local function eject(upstream, index, key, at)
    local passive = upstream.policy.passive
    -- The next failure after it is back ejects it again.
    signal.keep(FAILURES .. key, passive.failures - 1, FAILURES_TTL)
    local before = read(EJECTION, key, ejection_type, EJECTION_SIZE)
    if before and at < before.until_ and upstream.peers[index].since <= before.at
            or not has_others(upstream, index, at)
            or not dict:safe_add(RIGHT .. key, true, 0.1) then
        return
    end
    local ejection = ejection_type()
    ejection.at = at
    ejection.length = min(before and before.length * 2 or passive.eject, passive.max_eject)
    ejection.until_ = at + ejection.length
    ejection.count = (before and before.count or 0) + 1
    signal.keep(EJECTION .. key, ffi_string(ejection, EJECTION_SIZE),
                ejection.length + max(FORGIVEN, ejection.length))
    signal.raise(upstream.name)
    metrics.add(upstream.name, metrics.EJECTIONS)
    ngx.log(ngx.WARN, "tidegate: upstream ", upstream.name, ": peer ",
            codec.id(upstream.blob, upstream.head.count, index), " fails and is left alone for ",
            ejection.length, " s")
end


--- Notes that peer `index` has failed a request: no connection, no answer in time, or 502 to 504.
function _M.failed(upstream, index)
    local limit = upstream.policy.passive.failures
    if limit == 0 then
        return
    end
    local key, health = key_of(upstream, index), upstream.health
    local failures, first = signal.count(FAILURES .. key, 1, FAILURES_TTL)
    health.suspects = health.suspects or {}
    health.suspects[index] = true
    if not failures then
        return
    end
    if failures >= limit then
        eject(upstream, index, key, now())
    elseif first then
        signal.raise(upstream.name)
    end
end


--- Notes that peer `index`, one of the suspects, has answered a request as it should.
function _M.succeeded(upstream, index)
    local health = upstream.health
    dict:delete(FAILURES .. key_of(upstream, index))
    health.suspects[index] = nil
    if not next(health.suspects) then
        health.suspects = nil
    end
end


--- Takes the result of a check of a peer.
--
-- @param check the policy's
-- @param peer `{id, since}`
-- @param result `{ok, status, message}`
-- @param lasts seconds for which it says something
-- @return "healthy" or "unhealthy" if that is news
function _M.checked(name, check, peer, result, lasts)
    local key, at = key_for(name, peer.id), now()
    local verdict = verdict_of(key, peer.since, at)
    local news
    if not verdict then
        -- One that is up has been admitted, or had to be believed in.
        verdict = verdict_type()
        verdict.healthy = 1
        verdict.since = at
    end
    if result.ok == (verdict.healthy == 1) then
        verdict.streak = 0
    else
        verdict.streak = verdict.streak + 1
        if verdict.streak >= (result.ok and check.rise or check.fall) then
            verdict.streak = 0
            verdict.healthy = result.ok and 1 or 0
            verdict.since = at
            news = result.ok and "healthy" or "unhealthy"
        end
    end
    verdict.at = at
    verdict.valid = at + lasts
    verdict.status = result.status or 0
    signal.keep(VERDICT .. key, ffi_string(verdict, VERDICT_SIZE), lasts)
    if result.ok then
        dict:delete(MESSAGE .. key)
    else
        signal.keep(MESSAGE .. key, result.message, lasts)
    end
    if news then
        signal.raise(name)
    end
    return news
end


--- Notes why a peer that is being probed was not admitted by its check.
function _M.refused(name, peer, message)
    signal.keep(MESSAGE .. key_for(name, peer.id), message, REFUSED_TTL)
end


--- What is known of a peer of upstream `name`.
-- @param policy of the upstream
-- @param peer `{id, since}`
-- @return `{failures, ejection, verdict, message}`, each nil where there is none
function _M.of(name, policy, peer)
    local key, at = key_for(name, peer.id), now()
    local result = {}
    if policy.passive.failures > 0 then
        result.failures = dict:get(FAILURES .. key)
        result.ejection = ejection_of(key, peer.since, at)
    end
    if policy.check then
        result.verdict = verdict_of(key, peer.since, at)
        result.message = dict:get(MESSAGE .. key)
    end
    return result
end


--- Whether anything was ever noted about upstream `name`.
function _M.has_any(name)
    return dict:get(signal.key(name)) ~= nil
end


--- Deletes what is kept about upstreams that were removed and does not expire.
function _M.forget(names)
    for index = 1, #names do
        dict:delete(signal.key(names[index]))
        circuit.forget(names[index])
    end
    signal.note_change()
end


return _M
