--- Which peers this worker keeps away from, and what it makes of requests that fail.
--
-- Why: choosing a peer asks one question of this module, `usable`, and nothing else; what makes a
-- peer unusable is decided here. Must not choose anything.

local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"

local find = string.find
local gmatch = string.gmatch
local gsub = string.gsub
local key_of = peers.key
local min = math.min
local now = ngx.now
local pairs = pairs
local var = ngx.var

local EJECTION = 1
local MAX_EJECTION = 8
local FORGIVEN = 30         -- seconds after which an ejection's length starts anew

local _M = {}

local ejected = {}          -- "address:port" → {at, until_, length} in this worker
local ejections = 0


--- Adds what this module keeps with an opened version; `before` is the one it follows, if any.
function _M.open(upstream, before) -- luacheck: no unused args
end


--- Whether every peer of every upstream is usable as far as this worker knows.
function _M.quiet()
    return ejections == 0
end


--- Whether a peer may be sent to at time `at`.
function _M.usable(upstream, index, at)
    if ejections == 0 then
        return true
    end
    local ejection = ejected[key_of(upstream, index)]
    -- A peer that has come up since is a new one.
    return ejection == nil or at >= ejection.until_ or upstream.peers[index].since > ejection.at
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


--- Forgets ejections that are long over.
function _M.sweep()
    local at = now()
    for key, ejection in pairs(ejected) do
        if at > ejection.until_ + FORGIVEN then
            ejected[key] = nil
            ejections = ejections - 1
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


--- Takes note of the last attempt of this request at upstream `name`, if it failed to connect.
-- @return addresses tried since the last internal redirect, as a set
function _M.note_failure(name)
    local addresses, times = attempts(var.upstream_addr), attempts(var.upstream_connect_time)
    local last, tried = #addresses, {}
    for index = 1, last do
        tried[addresses[index]] = true
    end
    if last > 0 and times[last] == "-" and find(addresses[last], ":", 1, true) then
        eject(addresses[last])
        metrics.add(name, metrics.CONNECT_FAILURES)
    end
    return tried
end


--- Takes note of the failure of the last peer that this request was sent to, where none was asked
-- for after it.
function _M.note_last_failure(name)
    if not find(var.upstream_addr or "", " : $") then
        _M.note_failure(name)
    end
end


return _M
