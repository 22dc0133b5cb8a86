--- Peers that have not accepted a connection, and which a worker leaves alone for a short time.
--
-- Why apart: the http and the stream part of a worker do the same, each with tables of its own that
-- it keys as it needs. Whether to heed an ejection, where no other peer is left, is the caller's.

local min = math.min
local now = ngx.now
local pairs = pairs

local SHORTEST = 1
local LONGEST = 8
local FORGIVEN = 30         -- seconds after which an ejection's length starts anew

local _M = {}


--- Has `key` left alone from now on; each time that follows soon takes twice as long.
-- @param ejected table of what this module keeps by key
function _M.add(ejected, key)
    local at, before = now(), ejected[key]
    if before and at < before.until_ then
        return
    end
    local length = before and at < before.until_ + FORGIVEN
        and min(before.length * 2, LONGEST) or SHORTEST
    ejected[key] = { at = at, until_ = at + length, length = length }
end


--- Whether `ejection`, nil for none, is in force at Unix time `at` for a peer that has come up at
-- `since`: one that has come up after it is a new one.
function _M.holds(ejection, at, since)
    return ejection ~= nil and at < ejection.until_ and since <= ejection.at
end


--- Forgets ejections that are long over.
function _M.sweep(ejected)
    local at = now()
    for key, ejection in pairs(ejected) do
        if at > ejection.until_ + FORGIVEN then
            ejected[key] = nil
        end
    end
end


return _M
