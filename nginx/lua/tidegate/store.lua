--- The membership: all upstreams, in the shared dicts.
--
-- `tidegate_ptr` has, per upstream, the number of its current version; `tidegate_dat` has that
-- version as an immutable value. To write: add the new values, flip the pointers (8 bytes in
-- place, which cannot fail), delete the old values, set the revision last. A value in force is
-- never overwritten, since a failed `set` loses the old one. A request compares one number with
-- what its worker knows, so a push is in force everywhere the moment it is acknowledged.
--
-- Whoever writes holds the lock "push". Between flips and revision the mark "dirty" stands with the
-- revision that was to be: a worker that is killed there leaves a mixture. Whoever writes next then
-- gives it a revision of its own, so that no delta made from anything else is taken.

local codec = require "tidegate.codec"
local load = require "tidegate.load"
local lock = require "tidegate.lock"
local policies = require "tidegate.policy"
local signal = require "tidegate.signal"

local ctl = ngx.shared.tidegate_ctl
local ptr = ngx.shared.tidegate_ptr
local dat = ngx.shared.tidegate_dat
local probes = ngx.shared.tidegate_probes

local collect = collectgarbage
local error = error
local ipairs = ipairs
local match = string.match
local now = ngx.now
local pairs = pairs
local pcall = pcall
local sleep = ngx.sleep
local tonumber = tonumber
local update_time = ngx.update_time

local LOCK = "push"
local LOCK_WAIT = 2
local SLICE = 0.001
-- What a push has the collector do, in kB after so many upstreams: so that what it leaves behind
-- does not add up to memory that the worker never gives back.
local BATCH = 64
local STEP = 384

local _M = {}

local names_cache, names_version


local function key_of(name, number)
    return "\1" .. name .. "\1" .. number
end


-- Lets other requests of this worker run; called in loops over many upstreams. Not `sleep(0)`: on
-- Debian's build that comes back before nginx has looked at any socket.
local slice_start = 0
local function breathe()
    update_time()
    if now() - slice_start > SLICE then
        sleep(0.001)
        update_time()
        slice_start = now()
    end
end


_M.breathe = breathe


--- Number of the current version of upstream `name`; nil where there is none.
function _M.number(name)
    local number = ptr:get(name)
    return number ~= 0 and number or nil
end


--- The current version of upstream `name`.
-- @return packed value and its number; nil where there is no such upstream
function _M.get(name)
    for _ = 1, 5 do
        local number = _M.number(name)
        if not number then
            return nil
        end
        local blob = dat:get(key_of(name, number))
        if blob then
            return blob, number
        end
    end
    return nil
end


--- Names of all upstreams, in no order. The list is shared: do not change it.
function _M.names()
    local version = ctl:get("names") or 0
    if names_version ~= version then
        names_cache = ptr:get_keys(0)
        names_version = version
    end
    return names_cache
end


--- What is in force, in short.
function _M.summary()
    return {
        revision = ctl:get("revision") or 0,
        source = ctl:get("source") or "none",
        upstreams = #_M.names(),
        peers = ctl:get("peers") or 0,
        capacity = dat:capacity(),
        free = dat:free_space(),
        pushed_at = ctl:get("pushed_at"),
    }
end


local function next_number()
    return ctl:incr("number", 1, 0)
end


local function holds_cells(blob)
    return codec.head(blob).cell ~= 0
end


-- Cells of packed `blob` where its load is counted, as a set.
local function cells_of(blob)
    local result, head = {}, codec.head(blob)
    if head.cell ~= 0 then
        result[head.cell], result[head.queue_cell] = true, true
        local peers = codec.peers(blob)
        for index = 0, head.count - 1 do
            result[peers[index].cell] = true
        end
    end
    return result
end


-- Gives the upstream and its peers cells to count load in if its policy asks for it; those of the
-- version before stay.
local function take_cells(upstream, old)
    if not policies.counts_load(policies.parse(upstream.policy)) then
        for _, peer in ipairs(upstream.peers) do
            peer.cell = 0
        end
        return
    end
    upstream.cell = old and old.cell ~= 0 and old.cell or load.take()
    upstream.queue_cell = old and old.queue_cell ~= 0 and old.queue_cell or load.take()
    for _, peer in ipairs(upstream.peers) do
        if not peer.cell or peer.cell == 0 then
            peer.cell = load.take()
        end
    end
end


-- Gives back the cells of one packed version that the other one, if any, has not.
local function give_cells(blob, other)
    local kept = other and cells_of(other) or {}
    for cell in pairs(cells_of(blob)) do
        if not kept[cell] then
            load.give(cell)
        end
    end
end


-- Adds a new version beside the one in force.
local function stage(entry)
    entry.number = next_number()
    local ok, err = dat:safe_add(key_of(entry.name, entry.number), entry.blob)
    if not ok then
        return nil, err
    end
    if not entry.old_number then
        ok, err = ptr:safe_add(entry.name, 0)
        if not ok and err ~= "exists" then
            dat:delete(key_of(entry.name, entry.number))
            return nil, err
        end
    end
    return true
end


-- Ten thousand upstreams may be staged at once: texts are kept only where their cells are needed.
local function forget_texts(entry)
    if not (entry.blob and holds_cells(entry.blob)) then
        entry.blob = nil
    end
    if not (entry.old_blob and holds_cells(entry.old_blob)) then
        entry.old_blob = nil
    end
end


local function unstage(entry)
    if entry.blob then
        give_cells(entry.blob, entry.old_blob)
    end
    dat:delete(key_of(entry.name, entry.number))
    if not entry.old_number then
        ptr:delete(entry.name)
        ctl:incr("names", 1, 0)
    end
end


-- Deletes what a worker that was killed in the middle of a push had staged, and settles what it
-- had begun to put in force.
local function recover()
    for _, name in ipairs(ptr:get_keys(0)) do
        if ptr:get(name) == 0 then
            ptr:delete(name)
        end
    end
    for _, key in ipairs(dat:get_keys(0)) do
        local name, number = match(key, "^\1(.*)\1(%d+)$")
        if ptr:get(name) ~= tonumber(number) then
            dat:delete(key)
        end
    end
    ctl:incr("names", 1, 0)
    local wanted = {}
    for _, name in ipairs(_M.names()) do
        local blob = _M.get(name)
        for cell in pairs(blob and cells_of(blob) or {}) do
            wanted[cell] = true
        end
    end
    load.keep_only(wanted)
    local intended = ctl:get("dirty")
    if intended then
        local peers = 0
        for _, name in ipairs(_M.names()) do
            local blob = _M.get(name)
            peers = peers + (blob and codec.head(blob).count or 0)
        end
        ctl:set("peers", peers)
        ctl:set("writer", "")
        ctl:set("revision", intended + 1)
        ctl:incr("content", 1, 0)
        ctl:delete("dirty")
    end
    signal.end_change()
end


local function flip(entry)
    ptr:set(entry.name, entry.number)
    if entry.probing > 0 then
        probes:safe_set(entry.name, true)
    else
        probes:delete(entry.name)
    end
    if entry.old_number then
        dat:delete(key_of(entry.name, entry.old_number))
        if entry.old_blob then
            give_cells(entry.old_blob, entry.blob)
        end
    end
end


-- Calls `job(token, …)` under the lock; gives its results, or nil where the lock cannot be had.
local function locked(job, ...)
    local token, orphaned = lock.acquire(LOCK, LOCK_WAIT)
    if not token then
        return nil, { kind = "busy" }
    end
    if orphaned or ctl:get("dirty") then
        recover()
    end
    local ok, result, refusal = pcall(job, token, ...)
    lock.release(LOCK, token)
    if not ok then
        error(result, 0)
    end
    return result, refusal
end


-- Gives each peer the state in which it starts here, given the version before: a peer that was
-- not there has to accept a connection first, unless there is nobody else to do its work.
local function carry_over(upstream, old, at)
    local known = {}
    local alone = not old or #old.peers == 0
    for _, peer in ipairs(old and old.peers or {}) do
        known[peer.id] = peer
    end
    for _, peer in ipairs(upstream.peers) do
        local before = known[peer.id]
        local same = before and before.bytes == peer.bytes and before.port == peer.port
        if peer.state == codec.UP then
            if same and before.state == codec.PROBING
                    or not same and not (alone and upstream.hold == 0) then
                peer.state = codec.PROBING
            end
        end
        peer.since = same and before.state == peer.state and before.since or at
        peer.cell = same and before.cell or 0
        if same then
            peer.late = before.late and before.state ~= codec.DRAINING
        else
            peer.late = not alone
        end
    end
end


local function apply(token, push)
    local current = ctl:get("revision") or 0
    local full = push.base_revision == nil
    if push.revision == current and ctl:get("writer") == push.writer then
        return { revision = current, upserted = 0, removed = 0, changed = {}, removed_names = {} }
    end
    if push.revision <= current or not full and push.base_revision ~= current then
        return nil, { kind = "revision", revision = current }
    end

    update_time()
    local at, staged, upserted, needed, short = now(), {}, 0, 0, nil
    slice_start = at
    local peers = full and 0 or ctl:get("peers") or 0
    for name, upstream in push.next do
        breathe()
        if upserted % BATCH == BATCH - 1 then
            collect("step", STEP)
        end
        local old_blob, old_number = _M.get(name)
        local old = old_blob and codec.decode(old_blob)
        carry_over(upstream, old, at)
        take_cells(upstream, old)
        local blob, probing = codec.encode(upstream)
        upserted = upserted + 1
        peers = peers + #upstream.peers - (old and not full and #old.peers or 0)
        if blob ~= old_blob then
            local entry = {
                name = name, blob = blob, probing = probing,
                old_number = old_number, old_blob = old_blob,
            }
            needed = needed + #blob
            if not short and not stage(entry) then
                short = dat:free_space()
            end
            if short then
                give_cells(blob, old_blob)
            else
                staged[#staged + 1] = entry
                forget_texts(entry)
            end
        end
    end

    local complete = push.complete()
    local removed = {}
    if not complete then
        short = nil
    elseif full then
        for _, name in ipairs(_M.names()) do
            if not push.names[name] then
                removed[#removed + 1] = name
            end
        end
    else
        for _, name in ipairs(push.remove) do
            local blob = _M.get(name)
            if blob then
                removed[#removed + 1] = name
                peers = peers - codec.head(blob).count
            end
        end
    end

    if short or not complete or not lock.held(LOCK, token) then
        for _, entry in ipairs(staged) do
            unstage(entry)
        end
        if not complete then
            return nil, { kind = "incomplete" }
        elseif short then
            return nil, { kind = "dict_full", free_bytes = short, needed_bytes = needed }
        end
        return nil, { kind = "busy" }
    end

    -- From here to the end nothing yields and nothing can fail.
    ctl:set("dirty", push.revision)
    signal.begin_change()
    local changed, renamed = {}, #removed > 0
    for index, entry in ipairs(staged) do
        changed[index] = entry.name
        renamed = renamed or not entry.old_number
    end
    if renamed then
        -- Should this worker be killed in here, nothing that is served is missing from the list.
        ctl:incr("names", 1, 0)
    end
    for _, entry in ipairs(staged) do
        flip(entry)
    end
    for _, name in ipairs(removed) do
        local number, blob = ptr:get(name), _M.get(name)
        if blob then
            give_cells(blob)
        end
        ptr:delete(name)
        probes:delete(name)
        if number then
            dat:delete(key_of(name, number))
        end
    end
    if renamed then
        ctl:incr("names", 1, 0)
    end
    ctl:set("peers", peers)
    ctl:set("writer", push.writer)
    ctl:set("source", "push")
    ctl:set("pushed_at", at)
    signal.end_change()
    ctl:set("revision", push.revision)
    ctl:incr("content", 1, 0)
    ctl:delete("dirty")
    return {
        revision = push.revision,
        upserted = upserted,
        removed = #removed,
        changed = changed,
        removed_names = removed,
    }
end


--- Applies a push, whole or not at all. May yield.
--
-- @param push `{writer, revision, base_revision (nil: full), next, names, complete, remove}`:
--   `next()` gives name and upstream, as `wire.read_upstream` does, of the next one to be set, nil
--   after the last; `names` then has the names of all; `complete()` is asked at the end whether
--   they are all there was, else nothing is applied; `remove` is a list of others
-- @return `{revision, upserted, removed, changed = {names}, removed_names}` (counts as the push
--   has them, `changed` only what differs), or nil and `{kind =
--   "busy"|"revision"|"incomplete"|"dict_full", …}`
function _M.apply(push)
    return locked(apply, push)
end


--- Names of upstreams that have peers being probed.
function _M.probing_names()
    return probes:get_keys(0)
end


--- Peers of upstream `name` that are being probed.
function _M.probing_peers(name)
    local blob = _M.get(name)
    local result = {}
    local head = blob and codec.head(blob)
    if not head or head.probing == 0 then
        return result
    end
    for _, peer in ipairs(codec.decode(blob).peers) do
        if peer.state == codec.PROBING and peer.weight > 0 then
            result[#result + 1] = peer
        end
    end
    return result
end


local function admit(_, name, admitted)
    local blob, number = _M.get(name)
    if not blob then
        return true
    end
    local upstream, by_id, at = codec.decode(blob), {}, now()
    for _, peer in ipairs(admitted) do
        by_id[peer.id] = peer
    end
    for _, peer in ipairs(upstream.peers) do
        local it = by_id[peer.id]
        if it and peer.state == codec.PROBING and peer.bytes == it.bytes
                and peer.port == it.port then
            peer.state = codec.UP
            peer.since = at
        end
    end
    local entry = { name = name, old_number = number, old_blob = blob }
    entry.blob, entry.probing = codec.encode(upstream)
    if entry.blob ~= blob then
        if not stage(entry) then
            return nil
        end
        signal.begin_change()
        flip(entry)
        signal.end_change()
        ctl:incr("content", 1, 0)
    end
    return true
end


--- Admits peers of upstream `name` that have accepted a connection, as far as they are still the
-- same and still being probed. The revision stays. May yield.
-- @param admitted list of peers as `probing_peers` gives them
-- @return true when it is done, nil if the lock could not be had or there is no room
function _M.admit(name, admitted)
    return locked(admit, name, admitted)
end


-- A version from disk as it is to be in force: its cells were another run's, and peers that are
-- there at a start do not start slowly.
local function renew(blob, head)
    local policy = policies.parse(codec.policy(blob, head))
    if head.cell == 0 and policy.slow_start == 0 then
        return blob
    end
    local upstream = codec.decode(blob)
    for _, peer in ipairs(upstream.peers) do
        peer.cell, peer.late = 0, false
    end
    take_cells(upstream)
    return (codec.encode(upstream))
end


--- Puts a membership from disk into the empty dicts.
-- @param saved `{revision, writer, upstreams = {name = packed}}`
-- @return number of upstreams, or nil and why
function _M.load(saved)
    local count, peers = 0, 0
    for name, blob in pairs(saved.upstreams) do
        local head = codec.head(blob)
        if not head then
            return nil, "the record of upstream " .. name .. " cannot be read"
        end
        local entry = { name = name, blob = renew(blob, head), probing = head.probing }
        local ok, err = stage(entry)
        if not ok then
            return nil, "no room for upstream " .. name .. ": " .. err
        end
        flip(entry)
        count = count + 1
        peers = peers + head.count
    end
    ctl:set("peers", peers)
    ctl:set("writer", saved.writer)
    ctl:set("source", "disk")
    ctl:set("revision", saved.revision)
    ctl:incr("names", 1, 0)
    return count
end


--- Empties all: what a failed `load` has left behind.
function _M.clear()
    load.keep_only({})
    ptr:flush_all()
    dat:flush_all()
    probes:flush_all()
    ptr:flush_expired()
    dat:flush_expired()
    probes:flush_expired()
    ctl:incr("names", 1, 0)
end


return _M
