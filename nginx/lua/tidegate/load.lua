--- Requests in flight per peer, over all workers, and what else they share about a peer's load.
--
-- Why: least connections, limits and bounded hashing need a count that every worker sees at once,
-- and a shared dict costs a lock and a copy for each peer that is looked at. So this is plain
-- memory that the master maps before it forks. A worker writes only to a row of its own, so nothing
-- has to be locked, and what a worker that is killed leaves behind goes with its row. A peer has a
-- cell, a place in each row; `tidegate.store` gives and takes them, for those upstreams whose
-- policy asks for it. Nothing here knows what a count is for.

local ffi = require "ffi"
local get_request = require("resty.core.base").get_request
local memory = require "tidegate.memory"
local posix = require "tidegate.posix"
local process = require "ngx.process"

local ctl = ngx.shared.tidegate_ctl

local cast = ffi.cast
local fill = ffi.fill
local get_pid = ngx.worker.pid
local match = string.match
local max = math.max
local min = math.min
local ngx = ngx
local now = ngx.now
local pairs = pairs
local exp = math.exp
local tonumber = tonumber
local uintptr = ffi.typeof("uintptr_t")

local CELLS = 131072    -- of peers and upstreams; 0 is nobody's
local ROWS = 256        -- workers, those that are shutting down included
local CELL_SIZE = 4
local FADE = 10         -- seconds in which a latency that nobody measures loses 63 % of its weight
local WEIGHT_TIME = 5   -- seconds over which latencies are averaged
local FAILURE = 1       -- seconds that a failed attempt counts at least

ffi.cdef [[
typedef struct {
    double latency[131072];     /* of a cell's peer, in seconds; 0: not known */
    double measured[131072];    /* Unix time of that */
    uint8_t used[131072];       /* 1: a cell that belongs to somebody */
    int32_t pids[256];          /* of the row's worker; 0: free */
    int32_t rows;               /* the ones from here on were never used */
    int32_t cursor;             /* where the search for a free cell begins */
    int32_t highest;            /* the cells above were never used: their memory is not touched */
    int32_t taken;              /* cells that are used */
    int32_t counts[256][131072];
} tidegate_load_t;
]]

local counts_ptr = ffi.typeof("int32_t *")

local _M = { CAPACITY = CELLS - 1 }

local shared            -- tidegate_load_t
local row               -- this worker's counts
local row_number
local cells = {}        -- request → cell it is counted in
local totals = {}       -- request → second cell, of its upstream
local begun = {}        -- request → when, where its latency is wanted


--- Maps the memory, or finds what the configuration before has mapped. In the master.
function _M.configure()
    shared = memory.map("load", "tidegate_load_t")
end


-- What this worker has written others see from here on, and the other way round: a dict's lock is
-- a barrier.
local function barrier()
    ctl:get("load_sweep")
end


local function parent_of(pid)
    local text = posix.read("/proc/" .. pid .. "/stat")
    return text and tonumber(match(text, "%) %a (%d+)"))
end


-- Whether `pid` is still a worker of this nginx; its number may be another process's by now.
local function works(pid, master)
    if not posix.alive(pid) then
        return false
    end
    local parent = parent_of(pid)
    return not parent or parent == master
end


local function clear(number)
    fill(shared.counts[number], (shared.highest + 1) * CELL_SIZE)
    shared.pids[number] = 0
    ctl:delete("load_row" .. number)
end


--- Takes back the rows of workers that are gone. In any worker.
function _M.sweep()
    if not ctl:add("load_sweep", get_pid(), 0.5) then
        return
    end
    local master, own = process.get_master_pid(), get_pid()
    for number = 0, shared.rows - 1 do
        local pid = shared.pids[number]
        if pid ~= 0 and pid ~= own and not works(pid, master) then
            clear(number)
        end
    end
    ctl:delete("load_sweep")
end


-- Makes everybody look at the rows that are in use. Another worker may be doing the same.
local function announce()
    while true do
        barrier()
        local needed = 0
        for number = 0, ROWS - 1 do
            if shared.pids[number] ~= 0 then
                needed = number + 1
            end
        end
        if shared.rows >= needed then
            return
        end
        shared.rows = needed
    end
end


--- Takes a row for this worker.
function _M.start_worker()
    _M.sweep()
    local pid = get_pid()
    for number = 0, ROWS - 1 do
        if shared.pids[number] == pid then
            clear(number)
        end
        if not row and ctl:add("load_row" .. number, pid) then
            shared.pids[number] = pid
            row_number = number
            row = cast(counts_ptr, shared.counts[number])
        end
    end
    if not row then
        ngx.log(ngx.ERR, "tidegate: more than ", ROWS, " workers: counts of load may be wrong")
        row = cast(counts_ptr, shared.counts[ROWS - 1])
    end
    announce()
end


--- Gives the row back. In a worker that ends.
function _M.stop_worker()
    if row_number then
        clear(row_number)
    end
end


--- How many rows `sum` adds up.
function _M.rows()
    return shared.rows
end


--- What a cell counts, over all workers.
function _M.sum(cell)
    local counts, total = shared.counts, 0
    for number = 0, shared.rows - 1 do
        total = total + counts[number][cell]
    end
    return total
end


local sum = _M.sum


--- Adds `amount` to what this worker counts in a cell.
function _M.add(cell, amount)
    row[cell] = row[cell] + amount
end


--- Adds one to a cell unless it is at `limit` over all workers then; gives whether it did.
function _M.reserve(cell, limit)
    row[cell] = row[cell] + 1
    barrier()       -- a worker that does the same at the same time must see this
    if sum(cell) > limit then
        row[cell] = row[cell] - 1
        return false
    end
    return true
end


local function current()
    return tonumber(cast(uintptr, get_request()))
end


--- Notes that the current request is counted in `cell` (by `add` or `reserve`), and adds it to
-- `total` unless that is 0.
-- @param timed whether its latency is wanted
function _M.begin(cell, total, timed)
    local request = current()
    cells[request] = cell
    if total ~= 0 then
        row[total] = row[total] + 1
        totals[request] = total
    end
    if timed then
        begun[request] = now()
    end
end


-- A moving average in which a measurement counts the more, the longer ago the last one was.
local function measure(cell, seconds)
    local at, before = now(), shared.latency[cell]
    if before > 0 then
        local old = exp((shared.measured[cell] - at) / WEIGHT_TIME)
        -- Many answers within a millisecond must count as well.
        old = old < 0.95 and old or 0.95
        seconds = before * old + seconds * (1 - old)
    end
    shared.latency[cell] = seconds > 1e-4 and seconds or 1e-4
    shared.measured[cell] = at
end


--- Notes that the current request is with no peer any more.
-- @param failed whether the attempt failed
-- @param header_time function that gives the seconds until the answer's head, nil if there was
--   none; not asked where the attempt failed
function _M.finish(failed, header_time)
    local request = current()
    local cell = cells[request]
    if not cell then
        return
    end
    cells[request] = nil
    row[cell] = row[cell] - 1
    local total = totals[request]
    if total then
        totals[request] = nil
        row[total] = row[total] - 1
    end
    local at = begun[request]
    if at then
        begun[request] = nil
        local taken = now() - at
        local seconds
        if failed then
            -- Failing fast must not look like being fast.
            seconds = max(taken, FAILURE)
        else
            -- It says something even if there was no answer, where that took long.
            seconds = header_time() or taken > shared.latency[cell] and taken
        end
        if seconds then
            measure(cell, seconds)
        end
    end
end


--- Mean latency of a cell's peer in seconds, less the longer nobody has measured it; 0 if unknown.
function _M.latency(cell)
    local latency = shared.latency[cell]
    return latency > 0 and latency * exp((shared.measured[cell] - now()) / FADE) or 0
end


-- The first free cell from `first` on.
local function find_free(first)
    for cell = first, CELLS - 1 do
        -- Requests to a peer that was removed may still be under way.
        if shared.used[cell] == 0 and sum(cell) == 0 then
            return cell
        end
    end
    return nil
end


--- Takes a free cell, a low one; 0 where there is none. Under the lock of the store.
function _M.take()
    local cell = find_free(shared.cursor + 1) or find_free(1)
    if not cell then
        return 0
    end
    shared.used[cell] = 1
    shared.taken = shared.taken + 1
    shared.latency[cell] = 0
    shared.cursor = cell
    shared.highest = max(shared.highest, cell)
    return cell
end


--- Gives a cell back. Under the lock of the store.
function _M.give(cell)
    if cell ~= 0 and shared.used[cell] == 1 then
        shared.used[cell] = 0
        shared.taken = shared.taken - 1
        shared.cursor = min(shared.cursor, cell - 1)
    end
end


--- How many cells are taken.
function _M.used()
    return shared.taken
end


--- Gives back all cells that are not in the set `wanted`. Under the lock of the store.
function _M.keep_only(wanted)
    fill(shared.used, CELLS)
    shared.taken, shared.cursor = 0, 0
    for cell in pairs(wanted) do
        if cell ~= 0 then
            shared.used[cell] = 1
            shared.taken = shared.taken + 1
        end
    end
end


return _M
