--- Tells all workers that something about an upstream has changed.
--
-- Why: ejections, verdicts of checks and circuits are found by one worker and count in all. Each
-- upstream has one word in the shared dict; only if it is not the one that a worker knows is
-- anything else read. An upstream nobody had trouble with has none.
-- Before that, there is one number for all upstreams, another one after each change of a word or of
-- the membership: a worker that has looked at an upstream since need not look again.
-- Nothing in that dict is ever evicted to make room: what does not fit is not noted, and counted.

local ffi = require "ffi"
local memory = require "tidegate.memory"

local ctl = ngx.shared.tidegate_ctl
local dict = ngx.shared.tidegate_health

ffi.cdef [[
typedef struct {
    double newest;          /* number of the newest change */
} tidegate_signal_t;
]]

local PREFIX = "v\1"
local SERIAL = "\1serial"
local NEVER = 0 / 0         -- equal to nothing, itself included

local _M = {}

local shared                -- tidegate_signal_t


--- Maps the memory, or finds what the configuration before has mapped. In the master.
function _M.configure()
    shared = memory.map("signal", "tidegate_signal_t")
end


--- Number of the newest change; what is read after it is at least as new. While the membership is
-- being changed it is equal to nothing, itself included.
function _M.newest()
    return shared.newest
end


--- To be called before the membership is changed. If the worker is killed before `end_change`, all
-- others look each time until whoever writes next has cleared up.
function _M.begin_change()
    shared.newest = NEVER
end


--- To be called after it.
function _M.end_change()
    shared.newest = ctl:incr("change", 1, 0)
end


--- To be called after anything else was changed. Two that do so at a time leave either's number,
-- and neither was there before: who has seen the one looks again when the other comes.
function _M.note_change()
    local number = ctl:incr("change", 1, 0)
    if shared.newest == shared.newest then
        shared.newest = number
    end
end



--- Key of the word of upstream `name`.
function _M.key(name)
    return PREFIX .. name
end


--- Writes `value` for `seconds` (0: for good); gives whether there was room.
function _M.keep(key, value, seconds)
    local ok = dict:safe_set(key, value, seconds)
    if not ok then
        ctl:incr("health_lost", 1, 0)
    end
    return ok
end


--- Has all workers look at upstream `name` anew. What they are to find is written before.
function _M.raise(name)
    _M.keep(PREFIX .. name, dict:incr(SERIAL, 1, 0), 0)
    _M.note_change()
end


--- Adds `delta` to the number at `key`, which lasts for `seconds` from its first time.
-- @return the sum, and whether this was the first time; nil where there is no room
function _M.count(key, delta, seconds)
    local sum = dict:incr(key, delta)
    if sum then
        return sum, false
    end
    local ok, err = dict:safe_add(key, delta, seconds)
    if ok then
        return delta, true
    elseif err == "exists" then
        return dict:incr(key, delta), false
    end
    ctl:incr("health_lost", 1, 0)
    return nil
end


return _M
