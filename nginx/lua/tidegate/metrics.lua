--- Counters per upstream.
--
-- Why: counting is on the path of every request, so it is a few additions in memory of this
-- worker. Once a second, and when the worker ends, the differences go to the shared dict, where
-- they add up over workers. Keys are bounded: upstreams that exist times a fixed set of counters;
-- those of an upstream that is removed are deleted. `tidegate.exposition` makes text of them.

local ffi = require "ffi"
local get_request = require("resty.core.base").get_request
local store = require "tidegate.store"
local tcp_metrics = require "tidegate.tcp_metrics"

local ctl = ngx.shared.tidegate_ctl
local met = ngx.shared.tidegate_metrics
local inflight = ngx.shared.tidegate_inflight

local cast = ffi.cast
local concat = table.concat
local ffi_new = ffi.new
local fill = ffi.fill
local floor = math.floor
local get_method = ngx.req.get_method
local gmatch = string.gmatch
local ipairs = ipairs
local ngx = ngx
local now = ngx.now
local pairs = pairs
local setmetatable = setmetatable
local start_time = ngx.req.start_time
local tonumber = tonumber
local tostring = tostring
local uintptr = ffi.typeof("uintptr_t")
local var = ngx.var

local METHODS = { "read", "write", "other" }
local METHOD_CLASS = {
    GET = 0, HEAD = 0, OPTIONS = 0,
    POST = 5, PUT = 5, PATCH = 5, DELETE = 5,
}
local BOUNDS = { 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10 }

-- Places in the array of counters of one upstream.
local BUCKETS = 15          -- 0 to 14: method class * 5 + status class
local INFINITE = BUCKETS + #BOUNDS
local TOTAL = INFINITE + 1
local SUM = TOTAL + 1
local CONNECT_FAILURES = SUM + 1
local RETRIES = SUM + 2
local NO_PEER = SUM + 3
local HELD = SUM + 4        -- and the two after it
local QUEUE = SUM + 7       -- and the two after it
local EJECTIONS = SUM + 10
local CIRCUIT_OPENED = EJECTIONS + 1
local BUDGET_EXHAUSTED = EJECTIONS + 2
local RETRY_TOO_LATE = EJECTIONS + 3
local RETRIED_OK = EJECTIONS + 4
local RETRIED_FAILED = EJECTIONS + 5
local CHECKS_OK = EJECTIONS + 6
local CHECKS_FAILED = EJECTIONS + 7
local CIRCUIT_REFUSED = EJECTIONS + 8
local SIZE = EJECTIONS + 9
local COUNTER_SIZE = 8
local counters_type = ffi.typeof("double[?]")

local INFLIGHT_TTL = 5

local _M = {
    CONNECT_FAILURES = CONNECT_FAILURES,
    RETRIES = RETRIES,
    NO_PEER = NO_PEER,
    HELD_RESUMED = HELD,
    HELD_EXPIRED = HELD + 1,
    HELD_REFUSED = HELD + 2,
    QUEUE_ADMITTED = QUEUE,
    QUEUE_EXPIRED = QUEUE + 1,
    QUEUE_REFUSED = QUEUE + 2,
    EJECTIONS = EJECTIONS,
    CIRCUIT_OPENED = CIRCUIT_OPENED,
    CIRCUIT_REFUSED = CIRCUIT_REFUSED,
    BUDGET_EXHAUSTED = BUDGET_EXHAUSTED,
    RETRY_TOO_LATE = RETRY_TOO_LATE,
    RETRIED_OK = RETRIED_OK,
    RETRIED_FAILED = RETRIED_FAILED,
    CHECKS_OK = CHECKS_OK,
    CHECKS_FAILED = CHECKS_FAILED,
    TOTAL = TOTAL,
    SUM = SUM,
    REQUESTS = {},      -- labels and place of each counter of requests
    DURATIONS = {},     -- of each bucket, which has what is in no smaller one
}
for place = 0, BUCKETS - 1 do
    _M.REQUESTS[place + 1] = {
        ',method="' .. METHODS[floor(place / 5) + 1] .. '",code="' .. place % 5 + 1 .. 'xx"', place,
    }
end
for place = BUCKETS, INFINITE do
    _M.DURATIONS[place - BUCKETS + 1] = {
        ',le="' .. (BOUNDS[place - BUCKETS + 1] or "+Inf") .. '"', place,
    }
end

-- Upstream name → its counters in this worker, as long as something holds them: the balancer, a
-- request, or `dirty`.
local all = setmetatable({}, { __mode = "v" })
local dirty = {}    -- list of those that have counted since the last flush
local live = {}     -- address of a request → counters of the upstream it was sent to
local direct = false


--- Counters of upstream `name` in this worker: `{name, count (array; since the last flush),
-- inflight, dirty}`; `ended` once its requests leave something behind that the balancer has to
-- clear away at their end.
local function of(name)
    local entry = all[name]
    if not entry then
        entry = {
            name = name,
            count = ffi_new(counters_type, SIZE),
            inflight = 0,
            dirty = false,
        }
        all[name] = entry
    end
    return entry
end


_M.of = of


local function mark(entry)
    if not entry.dirty then
        entry.dirty = true
        dirty[#dirty + 1] = entry
    end
end


--- Adds one to the counter at `place` of upstream `name`.
function _M.add(name, place)
    local entry = of(name)
    entry.count[place] = entry.count[place] + 1
    mark(entry)
end


--- Notes that the current request is under way to the upstream of `entry`.
-- @return the entry that it was under way to before, if any
function _M.begin(entry)
    local request = tonumber(cast(uintptr, get_request()))
    local before = live[request]
    if before then
        before.inflight = before.inflight - 1
    end
    live[request] = entry
    entry.inflight = entry.inflight + 1
    return before
end


--- Whether `begin` was called for the current request.
function _M.is_under_way()
    return live[tonumber(cast(uintptr, get_request()))] ~= nil
end


--- Counts the current request, which has ended.
-- @return counters of its upstream, as `of` gives them
function _M.log()
    local request = tonumber(cast(uintptr, get_request()))
    local entry = live[request]
    if entry then
        live[request] = nil
        entry.inflight = entry.inflight - 1
    else
        entry = of(var.tidegate_upstream or "")
    end
    local count = entry.count
    local class = floor(ngx.status / 100) - 1
    if class < 0 or class > 4 then
        class = 4
    end
    local place = (METHOD_CLASS[get_method()] or 10) + class
    count[place] = count[place] + 1
    local seconds = now() - start_time()
    if seconds < 0 then
        seconds = 0
    end
    place = BUCKETS
    if seconds > 0.005 then
        local index = 2
        while index <= 11 and seconds > BOUNDS[index] do
            index = index + 1
        end
        place = BUCKETS + index - 1
    end
    count[place] = count[place] + 1
    count[TOTAL] = count[TOTAL] + 1
    count[SUM] = count[SUM] + seconds
    mark(entry)
    if direct then
        _M.flush()
    end
    return entry
end


-- `incr` with a start value, or `set`, would throw others out of a full dict.
local function add_up(key, delta)
    local value, err = met:incr(key, delta)
    if not value and err == "not found" then
        local ok
        ok, err = met:safe_add(key, delta)
        if not ok and err == "exists" then
            met:incr(key, delta)
        elseif not ok then
            ctl:incr("metrics_lost", 1, 0)
        end
    end
end


--- Adds what this worker has counted to the shared counters.
function _M.flush()
    local marked = dirty
    dirty = {}
    for _, entry in ipairs(marked) do
        entry.dirty = false
        local name, count = entry.name, entry.count
        if name == "" or store.number(name) then
            for place = 0, SIZE - 1 do
                if count[place] ~= 0 then
                    add_up(name .. "\1" .. place, count[place])
                end
            end
        end
        fill(count, SIZE * COUNTER_SIZE)
    end
    local busy = {}
    for name, entry in pairs(all) do
        if entry.inflight > 0 then
            busy[#busy + 1] = name .. "\1" .. entry.inflight .. "\2"
        end
    end
    inflight:safe_set(tostring(ngx.worker.pid()), concat(busy), INFLIGHT_TTL)
end


--- From now on each request is counted at once: this worker's timers do not run any more.
function _M.go_direct()
    direct = true
    _M.flush()
end


--- Deletes the counters of upstreams that were removed.
function _M.forget(names)
    for _, name in ipairs(names) do
        for place = 0, SIZE - 1 do
            met:delete(name .. "\1" .. place)
        end
        tcp_metrics.forget(name)
        store.breathe()
    end
end


--- What the workers have counted for upstream `name` at `place`; nil where that is nothing.
function _M.value(name, place)
    return met:get(name .. "\1" .. place)
end


--- Requests under way per upstream, over all workers that live.
function _M.in_flight()
    local sums = {}
    for _, pid in ipairs(inflight:get_keys(0)) do
        local text = tonumber(pid) and inflight:get(pid) or ""
        for name, count in gmatch(text, "(.-)\1(%d+)\2") do
            sums[name] = (sums[name] or 0) + tonumber(count)
        end
    end
    return sums
end


return _M
