--- What all workers know of peers that fail: failures, ejections, verdicts of checks.
--
-- Why: what one worker learns of a peer by a failed request (passive) or by a check (active) must
-- count in all of them and survive each change of the membership. So it lies in a shared dict, in
-- small records under upstream and peer id, never under an index. Records expire by themselves:
-- peers that are gone leave nothing behind. `signal` tells workers when to read them again, and of
-- which peers; all of them are read only where that is not known.
-- Must not choose anything.

local circuit = require "tidegate.circuit"
local codec = require "tidegate.codec"
local ffi = require "ffi"
local metrics = require "tidegate.metrics"
local signal = require "tidegate.signal"

local dict = ngx.shared.tidegate_health

local copy = ffi.copy
local ffi_string = ffi.string
local floor = math.floor
local max = math.max
local min = math.min
local next = next
local ngx = ngx
local now = ngx.now
local pairs = pairs
local setmetatable = setmetatable

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
local LARGE = 200           -- peers from which on reading all records takes its time, if it must be
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


-- The version of each upstream that was opened last, as long as somebody has it.
local latest = setmetatable({}, { __mode = "v" })


-- Index of the peer `id` among those from `first` on up to before `last`, which are sorted by id.
local function search(upstream, id, first, last)
    local blob, count, high = upstream.blob, upstream.head.count, last
    while first < high do
        local middle = floor((first + high) / 2)
        if codec.id(blob, count, middle) < id then
            first = middle + 1
        else
            high = middle
        end
    end
    return first < last and codec.id(blob, count, first) == id and first or nil
end


-- Index of the peer `id`; nil where it is neither up nor draining.
local function index_of(upstream, id)
    local backups, up = upstream.head.backups, upstream.up
    return search(upstream, id, 0, backups) or search(upstream, id, backups, up)
        or search(upstream, id, up, up + upstream.draining)
end


-- Reads the records of one peer.
local function read_peer(upstream, index, at)
    local health, policy = upstream.health, upstream.policy
    local key, since = key_of(upstream, index), upstream.peers[index].since
    local ends
    if policy.passive.failures > 0 then
        health.failing[index] = dict:get(FAILURES .. key) and true or nil
        local ejection = ejection_of(key, since, at)
        health.all_ejected[index] = ejection and true or nil
        ends = ejection and ejection.until_
    end
    if policy.check then
        local verdict = verdict_of(key, since, at)
        local out = verdict and verdict.healthy == 0
        health.all_unhealthy[index] = out and true or nil
        ends = out and min(ends or verdict.valid, verdict.valid) or ends
    end
    health.ends[index] = ends or nil
end


-- Sees what the records that were read come to.
local function settle(upstream, word)
    local health, panic_share = upstream.health, upstream.policy.panic
    local backups = upstream.head.backups
    local all, spare, next_load = upstream.up - backups, backups, nil
    local well = all
    for index, ends in pairs(health.ends) do
        next_load = min(next_load or ends, ends)
        if index < backups then
            spare = spare - 1
        elseif index < upstream.up then
            well = well - 1
        end
    end
    health.word = word
    health.next_load = next_load
    health.suspects = next(health.failing) and health.failing
    if all == 0 then
        all, well, spare = backups, spare, 0
    end
    -- Backup peers are there for this very case: as long as one of them is well, no panic.
    local panic = spare == 0 and well < panic_share * all
    health.ejected = not panic and next(health.all_ejected) and health.all_ejected or nil
    health.unhealthy = not panic and next(health.all_unhealthy) and health.all_unhealthy or nil
    circuit.load(upstream)
end


-- Reads all records of `upstream`.
local function load(upstream, word, at)
    local health = upstream.health
    for index = 0, upstream.up + upstream.draining - 1 do
        read_peer(upstream, index, at)
    end
    health.loaded = at
    health.torn = false
    settle(upstream, word)
end


-- Reads the records of those that are out and might not be any more.
local function read_ended(upstream, at)
    local ended = {}
    for index, ends in pairs(upstream.health.ends) do
        if ends <= at then
            ended[#ended + 1] = index
        end
    end
    for place = 1, #ended do
        read_peer(upstream, ended[place], at)
    end
end


-- Reads what `word` is about that this version does not know; all, where that is not told.
local function read_news(upstream, word, at)
    local health = upstream.health
    local told = word and (health.word or health.blank) and not health.torn
    local ids = told and signal.news(upstream.name, health.word or nil, word)
    if ids then
        read_ended(upstream, at)
        for id in pairs(ids) do
            local index = index_of(upstream, id)
            if index then
                read_peer(upstream, index, at)
            end
        end
        settle(upstream, word)
    elseif upstream.up < LARGE or at - health.loaded > upstream.up * SHARE then
        load(upstream, word, at)
    else
        health.torn = true
    end
end


-- Takes over what the version before knew, for the peers that are in both.
local function inherit(upstream, before, at)
    local known = before.health
    for _, set in pairs({ known.failing, known.ends }) do
        for old in pairs(set) do
            local id = codec.id(before.blob, before.head.count, old)
            local index = index_of(upstream, id)
            if index then
                read_peer(upstream, index, at)
            end
        end
    end
    upstream.health.loaded, upstream.health.torn = known.loaded, known.torn
    upstream.health.blank = known.blank
    settle(upstream, known.word)
end


--- Adds what this module keeps with an opened version.
function _M.open(upstream)
    local key, before = signal.key(upstream.name), latest[upstream.name]
    upstream.health = {
        word = false,
        word_key = key,
        keys = {},
        blank = not dict:get(key),  -- nothing was known when it was opened
        loaded = 0,
        torn = false,       -- news were missed, so that all has to be read
        next_load = nil,    -- when something that is known now ends
        failing = {},       -- index → true: has failures that a success has to take back
        all_ejected = {},   -- index → true
        all_unhealthy = {},
        ends = {},          -- index of one that is out → until when, as far as is known
        ejected = nil,      -- index → true, to be asked last
        unhealthy = nil,    -- index → true, not to be asked
        suspects = nil,     -- those that are failing, if any
    }
    if before and before.health.word and before.policy == upstream.policy then
        inherit(upstream, before, now())
    end
    latest[upstream.name] = upstream
end


--- Looks whether there is news of `upstream`.
-- @return whether all is known until `signal` says otherwise; if not, the next request has to look
--   again
function _M.look(upstream)
    local health = upstream.health
    local word = dict:get(health.word_key) or false
    if word ~= health.word then
        read_news(upstream, word, now())
    elseif health.next_load and now() >= health.next_load then
        read_ended(upstream, now())
        settle(upstream, word)
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
    local id = codec.id(upstream.blob, upstream.head.count, index)
    signal.raise(upstream.name, id)
    metrics.add(upstream.name, metrics.EJECTIONS)
    ngx.log(ngx.WARN, "tidegate: upstream ", upstream.name, ": peer ", id,
            " fails and is left alone for ", ejection.length, " s")
end


--- Notes that peer `index` has failed a request: no connection, no answer in time, or 502 to 504.
function _M.failed(upstream, index)
    local limit = upstream.policy.passive.failures
    if limit == 0 then
        return
    end
    local key, health = key_of(upstream, index), upstream.health
    local failures, first = signal.count(FAILURES .. key, 1, FAILURES_TTL)
    health.failing[index] = true
    health.suspects = health.failing
    if not failures then
        return
    end
    if failures >= limit then
        eject(upstream, index, key, now())
    elseif first then
        signal.raise(upstream.name, codec.id(upstream.blob, upstream.head.count, index))
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
        signal.raise(name, peer.id)
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
