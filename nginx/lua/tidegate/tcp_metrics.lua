--- Counters of connections that are passed on unopened, per upstream.
--
-- Why: they are counted in the stream part of a worker and told by the http part's `/metrics`;
-- here is what both have to agree on. Counting is an addition in this worker's memory; once a
-- second, and when a connection ends after the worker was told to, the differences go to the
-- shared dict.

local ffi = require "ffi"

local met = ngx.shared.tidegate_metrics
local inflight = ngx.shared.tidegate_inflight

local concat = table.concat
local ffi_new = ffi.new
local gmatch = string.gmatch
local ipairs = ipairs
local ngx = ngx
local pairs = pairs
local sub = string.sub
local tonumber = tonumber

local OPEN_PREFIX = "tcp:"      -- in the dict of what is under way, before the worker's pid
local OPEN_TTL = 5
local COUNTERS = {
    { "tcp_connections_total", ',result="ok"' },
    { "tcp_connections_total", ',result="failed"' },
    { "tcp_connections_total", ',result="no_peer"' },
    { "tcp_connect_failures_total", "" },
    { "tcp_held_connections_total", ',result="resumed"' },
    { "tcp_held_connections_total", ',result="expired"' },
    { "tcp_held_connections_total", ',result="refused"' },
    { "tcp_bytes_total", ',direction="received"' },
    { "tcp_bytes_total", ',direction="sent"' },
}
local SIZE = #COUNTERS + 1      -- place 0 is not used
local counters_type = ffi.typeof("double[?]")

local _M = {
    OK = 1, FAILED = 2, NO_PEER = 3, CONNECT_FAILURES = 4, HELD_RESUMED = 5, HELD_EXPIRED = 6,
    HELD_REFUSED = 7, RECEIVED = 8, SENT = 9,
    OPEN_PREFIX = OPEN_PREFIX,
    families = {
        { "tcp_connections_total", "counter", "TCP connections that ended, by how." },
        { "tcp_connect_failures_total", "counter", "TCP connections that a peer did not accept." },
        { "tcp_held_connections_total", "counter",
          "TCP connections that waited for a peer, by how that ended." },
        { "tcp_bytes_total", "counter", "Bytes received from clients and sent to them." },
    },
}

local all = {}


local function key_of(name, place)
    return name .. "\1t" .. place
end


--- Counters of upstream `name` in this worker: `{count (array), open, dirty}`.
local function of(name)
    local entry = all[name]
    if not entry then
        entry = {
            name = name,
            count = ffi_new(counters_type, SIZE),
            sent = ffi_new(counters_type, SIZE),
            open = 0,
            dirty = false,
        }
        all[name] = entry
    end
    return entry
end


--- Adds `amount`, one by default, to the counter at `place` of upstream `name`.
function _M.add(name, place, amount)
    local entry = of(name)
    entry.count[place] = entry.count[place] + (amount or 1)
    entry.dirty = true
end


--- Notes that a connection to upstream `name` began (1) or ended (-1).
function _M.opened(name, change)
    local entry = of(name)
    entry.open = entry.open + change
end


--- Adds what this worker has counted to the shared counters.
-- @param exists function that says whether an upstream is there
function _M.flush(exists)
    local open = {}
    for name, entry in pairs(all) do
        local there = exists(name)
        if entry.dirty and there then
            entry.dirty = false
            for place = 1, SIZE - 1 do
                local delta = entry.count[place] - entry.sent[place]
                local key = key_of(name, place)
                if delta > 0 and (met:incr(key, delta) or met:safe_add(key, delta)
                                  or met:incr(key, delta)) then
                    entry.sent[place] = entry.count[place]
                end
            end
        end
        if entry.open > 0 then
            open[#open + 1] = name .. "\1" .. entry.open .. "\2"
        elseif not there then
            all[name] = nil
        end
    end
    inflight:safe_set(OPEN_PREFIX .. ngx.worker.pid(), concat(open), OPEN_TTL)
end


--- Connections that are open per upstream, over all workers that live.
function _M.open_by_name()
    local sums = {}
    for _, key in ipairs(inflight:get_keys(0)) do
        if sub(key, 1, #OPEN_PREFIX) == OPEN_PREFIX then
            for name, count in gmatch(inflight:get(key) or "", "(.-)\1(%d+)\2") do
                sums[name] = (sums[name] or 0) + tonumber(count)
            end
        end
    end
    return sums
end


--- Calls `line(labels, amount)` for each counter of a family of upstream `name` that was ever
-- above 0.
function _M.each(name, family, line)
    for place, counter in ipairs(COUNTERS) do
        local amount = counter[1] == family and met:get(key_of(name, place))
        if amount then
            line(counter[2], amount)
        end
    end
end


--- Deletes the counters of an upstream that was removed.
function _M.forget(name)
    for place = 1, SIZE - 1 do
        met:delete(key_of(name, place))
    end
end


return _M
