--- Requests that wait until a peer of a limited upstream has room.
--
-- Why: they are admitted in the order in which they came, per worker, and those that come later do
-- not overtake them. How many may wait is counted over all workers. A request that ends in this
-- worker wakes the first one at once; places that become free in other workers are looked for a
-- hundred times a second.

local get_request = require("resty.core.base").get_request
local ffi = require "ffi"
local load = require "tidegate.load"
local selection = require "tidegate.selection"
local semaphore = require "ngx.semaphore"

local cast = ffi.cast
local max = math.max
local min = math.min
local ngx = ngx
local now = ngx.now
local on_abort = ngx.on_abort
local select_peer = selection.select
local sum = load.sum
local tonumber = tonumber
local uintptr = ffi.typeof("uintptr_t")

local FULL = selection.FULL
local POLL = 0.01
local SHORTEST = 0.002          -- a semaphore that waits for less than 1 ms does not wait at all
local DEFAULT_TIMEOUT = 10      -- seconds, where the policy does not say

local _M = {}

local waiting = {}              -- upstream name → {first, last, [place] = entry} in this worker
local admitted = {}             -- request → {upstream, index}: it is counted there already


local function current()
    return tonumber(cast(uintptr, get_request()))
end


-- The first one that waits for upstream `name`; forgets the list when nobody does.
local function head_of(name, list)
    while list.first <= list.last do
        local entry = list[list.first]
        if not entry.gone then
            return entry
        end
        list[list.first] = nil
        list.first = list.first + 1
    end
    waiting[name] = nil
    return nil
end


--- Has the first request that waits for upstream `name` look again.
function _M.wake(name)
    local list = waiting[name]
    local entry = list and head_of(name, list)
    if entry then
        entry.semaphore:post(1)
    end
end


-- Has the one after `entry` look: what `entry` waits for is not what the others do.
local function wake_after(list, entry)
    for place = entry.place + 1, list.last do
        local other = list[place]
        if not other.gone then
            other.semaphore:post(1)
            return
        end
    end
end


--- Whether requests wait for `upstream` in any worker.
function _M.busy(upstream)
    return sum(upstream.head.queue_cell) > 0
end


--- What the current request was admitted to by `wait`, once.
-- @return upstream and index, or nil
function _M.admitted()
    local request = current()
    local place = admitted[request]
    if place then
        admitted[request] = nil
        return place.upstream, place.index
    end
    return nil
end


--- Forgets what the current request was admitted to: it has ended.
function _M.forget()
    admitted[current()] = nil
end


local function enter(name)
    local list = waiting[name]
    if not list then
        list = { first = 1, last = 0 }
        waiting[name] = list
    end
    list.last = list.last + 1
    local entry = { semaphore = semaphore.new(0), place = list.last, gone = false }
    list[list.last] = entry
    return list, entry
end


--- Waits until a peer of upstream `name` has room for the current request. Yields.
-- @param lookup function that gives the upstream of a name as it is now
-- @param tried as for `selection.select`
-- @return true if the request can be proxied, and whether it had to wait for that; else nil and
--   `refused` (too many wait) or `expired`
function _M.wait(name, lookup, tried)
    local upstream = lookup(name)
    local cell = upstream and upstream.head.queue_cell or 0
    if not upstream or upstream.queue == 0 or cell == 0
            or not load.reserve(cell, upstream.queue) then
        return nil, "refused"
    end
    local timeout = upstream.policy.queue_timeout
    local deadline = now() + (timeout > 0 and timeout or DEFAULT_TIMEOUT)
    local list, entry = enter(name)
    local function leave()
        if not entry.gone then
            entry.gone = true
            load.add(cell, -1)
            _M.wake(name)
        end
    end
    local told, waited = false, false
    while true do
        local first = head_of(name, list) == entry
        if first or told then
            upstream = lookup(name)
            local index, why, session
            if upstream then
                index, why, session = select_peer(upstream, tried)
            end
            if index then
                admitted[current()] = { upstream = upstream, index = index }
            end
            if why ~= FULL then
                leave()
                return true, waited
            end
            if session then
                wake_after(list, entry)
            end
        end
        local left = deadline - now()
        if left <= 0 then
            leave()
            return nil, "expired"
        end
        if not waited then
            waited = true
            -- Nobody would free the place of a client that leaves unnoticed.
            if not on_abort(function()
                leave()
                ngx.exit(499)
            end) then
                leave()
                return nil, "refused"
            end
        end
        told = entry.semaphore:wait(max(first and min(left, POLL) or left, SHORTEST))
    end
end


return _M
