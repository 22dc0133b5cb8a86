--- Locks between workers that die with their holder.
--
-- Why: a worker may be killed while it holds a lock; the next one must not wait for a time limit,
-- so a lock carries the pid of its holder and is taken over when that process is gone.

local posix = require "tidegate.posix"

local dict = ngx.shared.tidegate_ctl
local get_pid = ngx.worker.pid
local get_phase = ngx.get_phase
local match = string.match
local now = ngx.now
local sleep = ngx.sleep
local tonumber = tonumber
local update_time = ngx.update_time

local TTL = 120
local STEP = 0.002

local serial = 0

local _M = {}


local function try(key)
    serial = serial + 1
    local token = get_pid() .. ":" .. serial
    if dict:add(key, token, TTL) then
        return token
    end
    local holder = dict:get(key)
    local pid = holder and tonumber(match(holder, "^%d+"))
    if pid and not posix.alive(pid) and dict:get(key) == holder then
        dict:delete(key)
        if dict:add(key, token, TTL) then
            return token, true
        end
    end
    return nil
end


--- Takes the lock `key`, waiting up to `wait` seconds (not at all where waiting is impossible).
-- @return a token for `release`, or nil; and whether its last holder died with it
function _M.acquire(key, wait)
    local token, orphaned = try(key)
    if token or wait == 0 or get_phase() == "exit_worker" then
        return token, orphaned
    end
    local deadline = now() + wait
    repeat
        sleep(STEP)
        token, orphaned = try(key)
        update_time()
    until token or now() >= deadline
    return token, orphaned
end


--- Whether `token` still holds the lock.
function _M.held(key, token)
    return dict:get(key) == token
end


--- Keeps the lock for longer, if `token` still holds it; gives whether it does.
function _M.renew(key, token)
    return dict:get(key) == token and dict:set(key, token, TTL) == true
end


--- Gives the lock back, if `token` still holds it.
function _M.release(key, token)
    if dict:get(key) == token then
        dict:delete(key)
    end
end


return _M
