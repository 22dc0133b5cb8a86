--- Connects to new peers, and admits those that accept.
--
-- Why: a task is RUNNING before its process listens; a peer that takes no connection yet must not
-- get requests, and where its upstream has an HTTP check, none that does not pass it. The worker
-- that applied a push starts at once; should it die, any other one finds the work in the shared
-- dict a second later. Nothing here is needed for requests to go on.

local checks = require "tidegate.checks"
local codec = require "tidegate.codec"
local lock = require "tidegate.lock"
local metrics = require "tidegate.metrics"
local policies = require "tidegate.policy"
local records = require "tidegate.records"
local store = require "tidegate.store"

local ipairs = ipairs
local exiting = ngx.worker.exiting
local max = math.max
local min = math.min
local ngx = ngx
local now = ngx.now
local pcall = pcall
local remove = table.remove
local sleep = ngx.sleep
local tcp = ngx.socket.tcp
local timer_at = ngx.timer.at

local MAX_RUNNERS = 256
local CONNECT_TIMEOUT = 1000    -- ms
-- Between attempts: a twentieth of the time since the first one, within limits, so that a peer is
-- found soon after it listens, in proportion to what it took to get there.
local PAUSE_SHARE = 0.05
local MIN_PAUSE = 0.02
local MAX_PAUSE = 0.25
local LATE = 60                 -- seconds after which it is only looked for once a second
local LATE_PAUSE = 1
local PATIENCE = 3              -- failures after which a peer lets others go first

local _M = {}

local queue = {}
local runners = 0
local probing = {}              -- "upstream\1peer" of all in this worker's hands
local admitted = {}             -- upstream → peers to be admitted in one go


local function admit(name, peer)
    local list = admitted[name]
    if list then
        list[#list + 1] = peer
        return
    end
    list = { peer }
    admitted[name] = list
    sleep(0.001)
    admitted[name] = nil
    store.admit(name, list)
end


local function check_of(name)
    local blob = store.get(name)
    local head = blob and codec.head(blob)
    local check = head and policies.parse(codec.policy(blob, head)).check
    return check and check.kind == "http" and check
end


local function passes(job, check)
    local result = checks.once(job.name, check, job.peer)
    metrics.add(job.name, result.ok and metrics.CHECKS_OK or metrics.CHECKS_FAILED)
    if not result.ok then
        records.refused(job.name, job.peer, result.message)
    end
    return result.ok
end


local function accepts(job)
    local check = check_of(job.name)
    if check then
        return passes(job, check)
    end
    local socket, peer = tcp(), job.peer
    socket:settimeout(CONNECT_TIMEOUT)
    local ok = socket:connect(codec.host(peer.family, peer.bytes), peer.port)
    socket:close()
    return ok
end


local function is_wanted(job)
    for _, peer in ipairs(store.probing_peers(job.name)) do
        if peer.id == job.peer.id and peer.bytes == job.peer.bytes
                and peer.port == job.peer.port then
            return true
        end
    end
    return false
end


local function pause(job)
    local waited = now() - job.since
    return waited > LATE and LATE_PAUSE or min(max(waited * PAUSE_SHARE, MIN_PAUSE), MAX_PAUSE)
end


-- Tries one peer until it accepts, is not wanted any more, or others ought to go first.
local function run(job)
    local failures = 0
    repeat
        if accepts(job) then
            admit(job.name, job.peer)
            return
        end
        failures = failures + 1
        if failures >= PATIENCE and #queue > 0 then
            queue[#queue + 1] = job
            return true
        end
        sleep(pause(job))
    until exiting() or not is_wanted(job)
end


local function runner()
    while #queue > 0 and not exiting() do
        local job = remove(queue, 1)
        local token = lock.acquire(job.key, 0)
        local ok, queued
        if token then
            ok, queued = pcall(run, job)
            lock.release(job.key, token)
            if not ok then
                ngx.log(ngx.ERR, "tidegate: probe of upstream ", job.name, ": ", queued)
            end
        end
        if not ok or not queued then
            probing[job.key] = nil
        end
    end
    runners = runners - 1
end


-- One more runner, if there is work; nginx may refuse a timer, then the next second sees to it.
local function staff()
    if #queue > 0 and runners < MAX_RUNNERS and timer_at(0, runner) then
        runners = runners + 1
    end
end


--- Starts on all peers of upstream `name` that are being probed and in nobody's hands.
function _M.start(name)
    for _, peer in ipairs(store.probing_peers(name)) do
        local key = "probe\1" .. name .. "\1" .. peer.id
        if not probing[key] then
            probing[key] = true
            queue[#queue + 1] = { name = name, peer = peer, key = key, since = now() }
            staff()
        end
    end
end


--- Starts on all that wait for it, such as what a worker that died had in its hands.
function _M.start_all()
    for _, name in ipairs(store.probing_names()) do
        _M.start(name)
        store.breathe()
    end
    staff()
end


return _M
