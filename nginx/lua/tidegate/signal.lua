--- Tells all workers that something about an upstream has changed other than its membership.
--
-- Why: ejections, verdicts of checks and circuits are found by one worker and count in all. Each
-- upstream has one word in the shared dict; a request reads it, and only if it is not the one that
-- its worker knows is anything else read. An upstream nobody had trouble with has none.
-- Nothing in that dict is ever evicted to make room: what does not fit is not noted, and counted.

local ctl = ngx.shared.tidegate_ctl
local dict = ngx.shared.tidegate_health

local PREFIX = "v\1"
local SERIAL = "\1serial"

local _M = {}


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
