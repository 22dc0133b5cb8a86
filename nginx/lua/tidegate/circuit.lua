--- Leaves an upstream alone of which most requests fail.
--
-- Why: requests that wait for an upstream that cannot serve keep clients, connections and the
-- upstream itself busy. All workers count into the same window, in slices that expire by
-- themselves; each slice is one number that holds both counts, so that counting is one addition.
-- A circuit that is open answers at once; when its time is over, one request at a time may try.

local metrics = require "tidegate.metrics"
local signal = require "tidegate.signal"

local dict = ngx.shared.tidegate_health

local ceil = math.ceil
local floor = math.floor
local max = math.max
local ngx = ngx
local now = ngx.now

local SLICES = 10
local FAILED = 2 ^ 26       -- one failure, in the number of a slice; below it are the requests
local OPEN = "o\1"
local SLICE = "w\1"
local TRIAL = "t\1"

local _M = {}


--- Reads the state of the circuit of `upstream`.
function _M.load(upstream)
    upstream.open_until = upstream.policy.circuit and dict:get(OPEN .. upstream.name)
end


--- Whether a request may go to `upstream`, whose circuit is open.
-- @return whether it may, and whether it is the one that tries
function _M.admit(upstream)
    local name = upstream.name
    if upstream.open_until > now() then
        return false, false
    elseif not dict:get(OPEN .. name) then
        return true, false
    end
    -- One of which nothing is heard for so long makes room for the next.
    local may = dict:safe_add(TRIAL .. name, true, upstream.policy.circuit.open) == true
    return may, may
end


local function open(upstream, at, reason)
    local seconds = upstream.policy.circuit.open
    signal.keep(OPEN .. upstream.name, at + seconds, 0)
    signal.raise(upstream.name, "")
    metrics.add(upstream.name, metrics.CIRCUIT_OPENED)
    ngx.log(ngx.WARN, "tidegate: upstream ", upstream.name, ": circuit open for ", seconds,
            " s: ", reason)
end


local function slice_key(name, slice)
    return SLICE .. name .. "\1" .. slice
end


local function clear(upstream, at)
    local newest = floor(at / (upstream.policy.circuit.window / SLICES))
    for slice = newest - SLICES, newest do
        dict:delete(slice_key(upstream.name, slice))
    end
end


--- Takes the result of the request that tries.
-- @param failed nil where it was given up by its client
function _M.tried(upstream, failed)
    local name = upstream.name
    if failed then
        open(upstream, now(), "the request that tried has failed")
    elseif failed == false then
        clear(upstream, now())
        dict:delete(OPEN .. name)
        signal.raise(name, "")
        ngx.log(ngx.WARN, "tidegate: upstream ", name, ": circuit closed")
    end
    dict:delete(TRIAL .. name)
end


--- Counts a request that has ended, and opens the circuit if too many failed.
function _M.count(upstream, failed)
    local circuit, at = upstream.policy.circuit, now()
    local width = circuit.window / SLICES
    local newest = floor(at / width)
    if upstream.slice ~= newest then
        upstream.slice = newest
        upstream.slice_key = slice_key(upstream.name, newest)
    end
    signal.count(upstream.slice_key, failed and FAILED + 1 or 1, circuit.window + width)
    if not failed or upstream.open_until then
        return
    end
    local requests, failures = 0, 0
    for slice = newest - SLICES + 1, newest do
        local value = dict:get(slice_key(upstream.name, slice)) or 0
        requests = requests + value % FAILED
        failures = failures + floor(value / FAILED)
    end
    if requests >= circuit.min_requests and failures >= circuit.error_ratio * requests
            and not dict:get(OPEN .. upstream.name) then
        open(upstream, at, failures .. " of " .. requests .. " requests failed")
    end
end


--- State of the circuit of upstream `name`: `closed`, `open` or `half_open`.
function _M.state(name)
    local until_ = dict:get(OPEN .. name)
    return not until_ and "closed" or until_ > now() and "open" or "half_open"
end


--- Deletes what is kept about upstream `name` and does not expire.
function _M.forget(name)
    dict:delete(OPEN .. name)
end


--- Seconds after which to come back, for the state that this worker knows.
function _M.retry_after(upstream)
    return upstream.open_until and max(ceil(upstream.open_until - now()), 1) or nil
end


return _M
