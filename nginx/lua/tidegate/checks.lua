--- Active health checks: asks every peer of an upstream that has a check, again and again.
--
-- Why: a peer that fails is to be found before requests find it, and one that is well again without
-- risking any. One worker does it for all: the one that holds the lock, which dies with it, so that
-- another one goes on within a second. What is known lies in `records`; the plan in this worker's
-- memory is made anew by whoever takes over. A check that comes late is late, it is never lost.

local codec = require "tidegate.codec"
local lock = require "tidegate.lock"
local metrics = require "tidegate.metrics"
local policies = require "tidegate.policy"
local records = require "tidegate.records"
local store = require "tidegate.store"

local ctl = ngx.shared.tidegate_ctl

local ceil = math.ceil
local collect = collectgarbage
local exiting = ngx.worker.exiting
local find = string.find
local gmatch = string.gmatch
local gsub = string.gsub
local ipairs = ipairs
local match = string.match
local max = math.max
local min = math.min
local next = next
local ngx = ngx
local now = ngx.now
local pairs = pairs
local pcall = pcall
local random = math.random
local sleep = ngx.sleep
local tcp = ngx.socket.tcp
local timer_at = ngx.timer.at
local tonumber = tonumber
local update_time = ngx.update_time

local LOCK = "checks"
local TICK = 0.05           -- seconds; the plan is kept in slots of that length
local IDLE = 0.25
local RESCAN = 0.25         -- at most that often is the membership looked through
local MAX_RUNNERS = 256     -- checks at a time
local FIRST = 1             -- a peer that is new here is checked within so many seconds
local MIN_LASTS = 60        -- seconds for which a result says something, at least
local REST = 16384          -- bytes of an answer that are read after its status, at most
local REST_TIME = 0.05      -- seconds for that, in all
local STATUS_LINE = 12      -- bytes up to the status
-- What the collector is told to do per upstream that is looked through, in kB: more than it takes.
local STEP = 4

local _M = {}

local token                 -- of the lock, while this worker is the one
local planned = {}          -- upstream → {number, check, peers = {id → job}}
local unchecked = {}        -- upstream without a check → number of the version that has none
local tick = 0              -- slots that have passed; not the clock's time, which may be set
local slots = {}            -- number of a slot → list of jobs
local due = {}              -- jobs to be done now, from `due_first` to `due_last`
local due_first, due_last = 1, 0
local runners = 0
local content               -- of the membership that was looked through last
local scanned_at = 0


-- The ranges of a list of statuses such as "200,300-399".
local ranges_cache = {}
local function ranges_of(text)
    local ranges = ranges_cache[text]
    if not ranges then
        ranges = {}
        for part in gmatch(text, "[^,]+") do
            local low, high = match(part, "^(%d+)%-?(%d*)$")
            if low then
                ranges[#ranges + 1] = { tonumber(low), tonumber(high) or tonumber(low) }
            end
        end
        ranges_cache[text] = ranges
    end
    return ranges
end


local function is_expected(status, text)
    for _, range in ipairs(ranges_of(text)) do
        if status >= range[1] and status <= range[2] then
            return true
        end
    end
    return false
end


-- Each call of a socket has a time limit of its own: a peer that sends a byte now and then would
-- never come to an end. So each gets what is left until `deadline`; false where nothing is.
local function limit(socket, deadline)
    update_time()
    local left = (deadline - now()) * 1000
    socket:settimeout(max(left, 1))
    return left > 0
end


-- Reads what is left of an answer, so that the peer does not see its connection reset.
local function read_rest(socket)
    update_time()
    local deadline, size = now() + REST_TIME, 0
    while size < REST and limit(socket, deadline) do
        local data = socket:receiveany(REST)
        if not data then
            return
        end
        size = size + #data
    end
end


-- The status of an answer; those of 1xx come before it.
-- @return number; or nil and what is wrong
local function read_status(socket, deadline)
    local text = ""
    while #text < REST and limit(socket, deadline) do
        local data, err = socket:receiveany(REST - #text)
        if not data then
            return nil, "no answer: " .. err
        end
        text = text .. data
        local skipped
        repeat
            text, skipped = gsub(text, "^HTTP/1%.[01] 1%d%d.-\r?\n\r?\n", "", 1)
        until skipped == 0
        local status = match(text, "^HTTP/1%.[01] ([2-9]%d%d)")
        if status then
            return tonumber(status)
        elseif #text >= STATUS_LINE and not find(text, "^HTTP/1%.[01] 1%d%d") then
            return nil, "the answer is not HTTP"
        end
    end
    return nil, "no answer: timeout"
end


local function ask(socket, check, host, deadline)
    local ok, err
    if check.tls then
        limit(socket, deadline)
        ok, err = socket:sslhandshake(false, (gsub(host, ":%d+$", "")), false)
        if not ok then
            return { ok = false, message = "no TLS: " .. err }
        end
    end
    limit(socket, deadline)
    ok, err = socket:send(check.method .. " " .. check.path .. " HTTP/1.1\r\nHost: " .. host
                                .. "\r\nUser-Agent: tidegate-check\r\nAccept: */*\r\n"
                                .. "Connection: close\r\n\r\n")
    if not ok then
        return { ok = false, message = "no answer: " .. err }
    end
    local status
    status, err = read_status(socket, deadline)
    if not status then
        return { ok = false, message = err }
    end
    read_rest(socket)
    if is_expected(status, check.status) then
        return { ok = true, status = status }
    end
    return { ok = false, status = status, message = "status " .. status .. ", expected "
                                                    .. check.status }
end


--- Host to ask for, where the check names none: that of the route, which the upstream is named
-- after, or else the peer.
local function host_of(check, name, peer)
    if check.host ~= "" then
        return check.host
    end
    local host = match(name, "^[^/]+")
    if host and find(host, "^[A-Za-z0-9_.:%[%]-]+$") then
        return host
    end
    return codec.host(peer.family, peer.bytes)
end


--- Checks a peer once. Waits for up to the check's time limit.
-- @param name of the upstream
-- @param peer `{family, bytes, port}`
-- @return `{ok, status, message}`
function _M.once(name, check, peer)
    local socket, deadline = tcp(), now() + check.timeout
    socket:settimeout(check.timeout * 1000)
    local ok, err = socket:connect(codec.host(peer.family, peer.bytes), peer.port)
    local result
    if not ok then
        result = { ok = false, message = "no connection: " .. err }
    elseif check.kind == "http" then
        result = ask(socket, check, host_of(check, name, peer), deadline)
    else
        result = { ok = true }
    end
    socket:close()
    return result
end


local function plan(job, delay)
    local slot = tick + ceil(delay / TICK)
    local list = slots[slot]
    if not list then
        list = {}
        slots[slot] = list
    end
    list[#list + 1] = job
end


local function is_planned(job)
    local upstream = planned[job.name]
    return token and upstream and upstream.peers[job.peer.id] == job
end


-- How long a result says something: through a change of the worker, and some checks that are late.
local function lasts(check)
    return max(MIN_LASTS, 3 * (check.interval + check.timeout))
end


local function run(job)
    local name = job.name
    local check = planned[name].check
    local result = _M.once(name, check, job.peer)
    if not is_planned(job) then
        return
    end
    metrics.add(name, result.ok and metrics.CHECKS_OK or metrics.CHECKS_FAILED)
    local news = records.checked(name, check, job.peer, result, lasts(check))
    if news then
        ngx.log(ngx.WARN, "tidegate: upstream ", name, ": peer ", job.peer.id, " is ", news,
                result.message and ": " .. result.message or "")
    end
end


local function runner()
    while due_first <= due_last and not exiting() do
        local job = due[due_first]
        due[due_first] = nil
        due_first = due_first + 1
        if is_planned(job) then
            local ok, err = pcall(run, job)
            if not ok then
                ngx.log(ngx.ERR, "tidegate: check of upstream ", job.name, ": ", err)
            end
            if is_planned(job) then
                plan(job, planned[job.name].check.interval * (0.9 + 0.2 * random()))
            end
        end
    end
    runners = runners - 1
end


-- Plans the peers of one upstream, and forgets those that are gone.
local function scan_upstream(name, number)
    local blob = store.get(name)
    local head = blob and codec.head(blob)
    local check = head and policies.parse(codec.policy(blob, head)).check
    if not check then
        planned[name], unchecked[name] = nil, number
        return
    end
    local before = planned[name]
    local old, jobs = before and before.peers or {}, {}
    local sooner = before and before.check and check.interval < before.check.interval
    for _, peer in ipairs(codec.decode(blob).peers) do
        if peer.state == codec.UP and peer.weight > 0 then
            local job = old[peer.id]
            if not job or sooner or job.peer.bytes ~= peer.bytes or job.peer.port ~= peer.port then
                job = { name = name, peer = peer }
                plan(job, random() * min(check.interval, FIRST))
            end
            job.peer = peer
            jobs[peer.id] = job
        end
    end
    planned[name], unchecked[name] = { number = number, check = check, peers = jobs }, nil
end


-- Brings the plan up to date with the membership.
local function scan(at)
    local newest = ctl:get("content") or 0
    if newest == content or at >= scanned_at and at - scanned_at < RESCAN then
        return
    end
    content, scanned_at = newest, at
    for _, name in ipairs(store.names()) do
        local number = store.number(name)
        local plan_of = planned[name]
        if number and (plan_of and plan_of.number or unchecked[name]) ~= number then
            scan_upstream(name, number)
            collect("step", STEP)
        end
        store.breathe()
    end
    for _, list in ipairs({ planned, unchecked }) do
        for name in pairs(list) do
            if not store.number(name) then
                list[name] = nil
            end
        end
    end
end


local function start_runners()
    for _ = 1, min(due_last - due_first + 1, MAX_RUNNERS - runners) do
        if timer_at(0, runner) then
            runners = runners + 1
        end
    end
end


-- Does what is due, until another worker has taken over or this one ends.
local function lead()
    local before, part = now(), 0
    while not exiting() and lock.renew(LOCK, token) do
        update_time()
        local at = now()
        scan(at)
        part = part + min(max(at - before, 0), 1) / TICK
        before = at
        while part >= 1 do
            part = part - 1
            tick = tick + 1
            for _, job in ipairs(slots[tick] or {}) do
                due_last = due_last + 1
                due[due_last] = job
            end
            slots[tick] = nil
        end
        start_runners()
        sleep(next(slots) and TICK or IDLE)
    end
end


local function forget_all()
    planned, unchecked, slots, due, content, scanned_at = {}, {}, {}, {}, nil, 0
    due_first, due_last = 1, 0
end


local function run_lead(premature)
    if not premature then
        local ok, err = pcall(lead)
        if not ok then
            ngx.log(ngx.ERR, "tidegate: health checks: ", err)
        end
    end
    _M.stop()
end


--- Has this worker do the checks if no other one does; called each second.
function _M.start()
    if token or exiting() then
        return
    end
    token = lock.acquire(LOCK, 0)
    if token and not timer_at(0, run_lead) then
        _M.stop()
    end
end


--- Leaves the checks to another worker.
function _M.stop()
    if token then
        lock.release(LOCK, token)
        token = nil
    end
    forget_all()
end


return _M
