--- Changes the site: stage, test, switch, reload, confirm, else back to the one before.
--
-- Why: what is rendered takes a reload, and a reload must not be believed but seen: the change is
-- done when new workers run it. A worker does all this itself: master and workers are the same
-- user, so it may signal its master; `nginx -t` runs in the background, so no request waits.
--
-- `STATE/site/` has a directory per generation and the link `current`. A directory is complete
-- before it gets its name, and the link changes in one step.

local limits = require "tidegate.limits"
local lock = require "tidegate.lock"
local posix = require "tidegate.posix"
local store = require "tidegate.store"

local ctl = ngx.shared.tidegate_ctl

local concat = table.concat
local exiting = ngx.worker.exiting
local execute = os.execute
local find = string.find
local format = string.format
local gmatch = string.gmatch
local gsub = string.gsub
local huge = math.huge
local match = string.match
local ngx = ngx
local now = ngx.now
local os_remove = os.remove
local os_rename = os.rename
local pairs = pairs
local pcall = pcall
local process = require "ngx.process"
local sleep = ngx.sleep
local sort = table.sort
local sub = string.sub
local tonumber = tonumber
local update_time = ngx.update_time

local LOCK = "site"
local LIST = "/.files"      -- in a generation's directory: the names of its files, a line each
local TEST_LIMIT = 60       -- seconds for `nginx -t`
local RELOAD_LIMIT = 10     -- seconds for new workers to appear, and twice what the test took
local OLD_LIMIT = 2         -- seconds for the old workers to hear of it
local STEP = 0.01
local BUILTIN = "builtin"
-- What nginx.conf includes of a site's directory.
local INCLUDED = { "00-default.main", "00-default.events", "*.conf", "*.stream" }

local _M = {}

local settings              -- {run, state, binary}
local prepare               -- called with the files of a site before it is tested
local generation = ""       -- of the configuration that this process was made from
local load = 0              -- number of that configuration


--- Fixes, while a configuration is loaded, which site it is made of.
-- @param options `{run, state, binary}`: directories and nginx's binary
-- @param prepare_site called with the files of a new site, name to text, before it is tested
function _M.configure(options, prepare_site)
    settings = options
    prepare = prepare_site
    local target = posix.readlink(options.state .. "/site/current")
    generation = target and target ~= BUILTIN and target or ""
    load = ctl:incr("loads", 1, 0)
end


--- Tells all workers that this one runs its generation, and of how many it is one.
function _M.worker_started()
    ctl:set("workers\1" .. load, ngx.worker.count(), 600)
    ctl:incr("started\1" .. load, 1, 0, 600)
    if load >= (ctl:get("running_load") or 0) then
        ctl:set("running_load", load)
        ctl:set("generation", generation)
    end
end


--- The generation that the newest workers run; "" before the first site.
function _M.generation()
    return ctl:get("generation") or ""
end


--- The generation that runs and its files, name to text; none before the first site.
function _M.files()
    local running, files = _M.generation(), {}
    if running ~= "" then
        local directory = settings.state .. "/site/" .. running
        for name in gmatch(posix.read(directory .. LIST) or "", "[^\n]+") do
            files[name] = posix.read(directory .. "/" .. name)
            store.breathe()
        end
    end
    return running, files
end


--- Number of the configuration that this process was made from; larger for newer ones.
function _M.load_number()
    return load
end


--- The files of the site that the configuration being loaded is made of, name to text.
function _M.texts()
    local texts = {}
    if generation ~= "" then
        local directory = settings.state .. "/site/" .. generation
        for name in gmatch(posix.read(directory .. LIST) or "", "[^\n]+") do
            texts[name] = posix.read(directory .. "/" .. name)
        end
    end
    return texts
end


local function wait_for(limit, check)
    local deadline = now() + limit
    while true do
        local result = check()
        if result then
            return result
        end
        update_time()
        if now() >= deadline then
            return nil
        end
        sleep(STEP)
    end
end


-- Takes a directory out of the way at once, and deletes it in the background.
local function remove_tree(path)
    local doomed = format("%s.%d-%d.old", path, ngx.worker.pid(), ctl:incr("removed", 1, 0))
    if os_rename(path, doomed) then
        posix.close_on_exec()
        execute("rm -rf -- " .. posix.quote(doomed) .. " </dev/null >/dev/null 2>&1 &")
    end
end


local function sorted_names(files)
    local names = {}
    for name in pairs(files) do
        names[#names + 1] = name
    end
    sort(names)
    return names
end


-- Writes the files into a new directory, and what has to be there besides.
local function stage(directory, files)
    remove_tree(directory)
    local ok, err = posix.mkdir(directory)
    for name, text in pairs(ok and limits.defaults(files) or {}) do
        ok, err = posix.write(directory .. "/" .. name, text)
        if not ok then
            return nil, err
        end
    end
    local names = sorted_names(files)
    for _, name in ipairs(ok and names or {}) do
        ok, err = posix.write(directory .. "/" .. name, files[name])
        if not ok then
            break
        end
        store.breathe()
    end
    if ok then
        ok, err = posix.write(directory .. LIST, concat(names, "\n"))
    end
    return ok, err
end


-- The configuration that includes `directory` in the place of the current site.
local function write_test_conf(path, directory)
    local text, err = posix.read(settings.run .. "/nginx.conf")
    if not text then
        return nil, err
    end
    local function replace(from, to)
        local first, last = find(text, from, 1, true)
        if first then
            text = sub(text, 1, first - 1) .. to .. sub(text, last + 1)
        end
    end
    for _, name in ipairs(INCLUDED) do
        replace(settings.state .. "/site/current/" .. name, directory .. "/" .. name)
    end
    replace('require("tidegate.init").start', 'require("tidegate.init").test')
    replace(settings.run .. "/nginx.pid", path .. ".pid")
    return posix.write(path, text)
end


-- What nginx says against a configuration.
-- @return `{message, file, line}`, file and line where it names them
local function explain(output, directory, files)
    local message
    for line in gmatch(output, "[^\n]+") do
        if find(line, "[emerg]", 1, true) then
            message = line
            break
        end
    end
    message = message or match(output, "[^\n]+") or "nginx said nothing"
    message = gsub(gsub(message, "^.-%[%a+%] ", ""), "^%d+#%d+: ", "")
    local refusal = { message = message }
    local path, number = match(message, " in (%S+):(%d+)$")
    if path then
        refusal.line = tonumber(number)
        if sub(path, 1, #directory + 1) == directory .. "/" then
            refusal.file = sub(path, #directory + 2)
        end
        refusal.message = gsub(message, " in %S+:%d+$", "")
        return refusal
    end
    local blamed = limits.blamed(message, files)
    if blamed then
        refusal.file, refusal.line = blamed, 1
        return refusal
    end
    -- Of a port it says which, but not who asked for it. Those of `.conf` files are everybody's.
    local port = match(message, "^bind%(%) to %S+:(%d+) failed")
    for _, name in ipairs(port and sorted_names(files) or {}) do
        local at = find(name, "%.stream$") and find(files[name], "listen " .. port .. "[ ;]")
        if at then
            local _, breaks = gsub(sub(files[name], 1, at), "\n", "")
            refusal.file, refusal.line = name, breaks + 1
            return refusal
        end
    end
    -- Of a certificate or the like nginx says which, but not who asked for it.
    local quoted = match(message, '"([^"]+)"')
    for _, name in ipairs(quoted and sorted_names(files) or {}) do
        local at = find(files[name], quoted, 1, true)
        if at then
            local _, breaks = gsub(sub(files[name], 1, at), "\n", "")
            refusal.file, refusal.line = name, breaks + 1
            break
        end
    end
    return refusal
end


-- Runs `nginx -t`, and if that passes has the staged files synced, in the background.
-- @return true; or nil and `explain`'s refusal
local function test(directory, files)
    local conf = settings.run .. "/test.conf"
    local ok, err = write_test_conf(conf, directory)
    if not ok then
        return nil, { message = err }
    end
    local out, code = conf .. ".out", conf .. ".code"
    os_remove(code)
    local command = format(
        "( %s -t -p %s -e stderr -c %s >%s 2>&1; result=$?; sync -f %s 2>/dev/null; "
        .. "echo $result >%s.new; mv %s.new %s ) </dev/null >/dev/null 2>&1 &",
        posix.quote(settings.binary), posix.quote(settings.run .. "/"), posix.quote(conf),
        posix.quote(out), posix.quote(directory), posix.quote(code), posix.quote(code),
        posix.quote(code))
    posix.close_on_exec()
    execute(command)
    local result = wait_for(TEST_LIMIT, function()
        return posix.read(code)
    end)
    if not result then
        return nil, { message = "nginx -t did not end within " .. TEST_LIMIT .. " s" }
    end
    if tonumber(result) ~= 0 then
        return nil, explain(posix.read(out) or "", directory, files)
    end
    return true
end


local function log_size()
    local text = posix.read(settings.run .. "/emerg.log")
    return text and #text or 0
end


-- What nginx has logged as fatal since `offset`; failed binds are tried again for a while.
local function log_since(offset)
    local text = sub(posix.read(settings.run .. "/emerg.log") or "", offset + 1)
    for line in gmatch(text, "[^\n]+") do
        if find(line, "still could not bind()", 1, true) then
            return match(text, "[^\n]*bind%(%) to[^\n]*") or line
        end
        if find(line, "[emerg]", 1, true) and not find(line, "%[emerg%] %d+#%d+: bind%(%) to") then
            return line
        end
    end
    return nil
end


-- Has the master reload, and waits until all new workers run `wanted`.
local function reload(wanted, limit)
    local offset, previous = log_size(), ctl:get("running_load") or 0
    local ok, err = posix.kill(process.get_master_pid(), posix.SIGHUP)
    if not ok then
        return nil, err
    end
    local fatal
    local confirmed = wait_for(limit, function()
        fatal = log_since(offset)
        local running = ctl:get("running_load") or 0
        return fatal or running > previous and ctl:get("generation") == wanted
            -- Of the new workers: the site may have asked for another number of them.
            and (ctl:get("started\1" .. running) or 0)
                >= (ctl:get("workers\1" .. running) or huge)
    end)
    if fatal then
        return nil, fatal
    end
    if not confirmed then
        return nil, format("no new worker runs it after %g s", limit)
    end
    -- The old workers are told a little later not to take any more connections.
    wait_for(OLD_LIMIT, exiting)
    return true
end


local function directory_of(name)
    return settings.state .. "/site/" .. name
end


local function change(wanted, files)
    local current_link = directory_of("current")
    local before = posix.readlink(current_link) or BUILTIN
    local staging = directory_of(wanted .. ".staging")
    local ok, err = stage(staging, files)
    if not ok then
        return nil, { stage = "test", message = "the files cannot be written: " .. err }
    end
    prepare(files)
    update_time()
    local started = now()
    local passed, refusal = test(staging, files)
    if not passed then
        remove_tree(staging)
        refusal.stage = "test"
        return nil, refusal
    end
    local took = now() - started

    if before ~= wanted then
        remove_tree(directory_of(wanted))
        ok, err = os_rename(staging, directory_of(wanted))
        if ok then
            ok, err = posix.switch_link(wanted, current_link)
        end
        if not ok then
            return nil, { stage = "test", message = "the site cannot be switched: " .. err }
        end
        posix.fsync(directory_of(""))
    else
        remove_tree(staging)
    end

    ok, err = reload(wanted, RELOAD_LIMIT + 2 * took)
    if not ok then
        if before ~= wanted then
            posix.switch_link(before, current_link)
        end
        if _M.generation() ~= (before == BUILTIN and "" or before) then
            posix.kill(process.get_master_pid(), posix.SIGHUP)
        end
        local reason = explain(err, directory_of("current"), files)
        reason.stage = "reload"
        return nil, reason
    end

    local previous_link = directory_of("previous")
    local oldest = posix.readlink(previous_link)
    if before ~= wanted then
        posix.switch_link(before, previous_link)
        if oldest and oldest ~= before and oldest ~= wanted and oldest ~= BUILTIN then
            remove_tree(directory_of(oldest))
        end
    end
    return true
end


--- Makes `files` the site. Yields, for up to `TEST_LIMIT + RELOAD_LIMIT` and more.
-- @param wanted generation, 64 hex digits
-- @return "reloaded" or "unchanged"; or nil and `{kind = "busy"}` or
--   `{kind = "refused", stage, message, file, line}`
function _M.apply(wanted, files)
    local token = lock.acquire(LOCK, 0)
    if not token then
        return nil, { kind = "busy" }
    end
    if _M.generation() == wanted then
        lock.release(LOCK, token)
        return "unchanged"
    end
    local ok, result, refusal = pcall(change, wanted, files)
    lock.release(LOCK, token)
    if not ok then
        result, refusal = nil, { stage = "test", message = "internal error: " .. result }
        ngx.log(ngx.ERR, "tidegate: site ", wanted, ": ", refusal.message)
    end
    if not result then
        refusal.kind = "refused"
        ctl:incr("site_refusals", 1, 0)
        return nil, refusal
    end
    ctl:incr("site_changes", 1, 0)
    return "reloaded"
end


--- Has nginx read the current site anew, for a file that it refers to has changed. Yields.
-- @return true; or nil and why not
function _M.reload()
    local token = lock.acquire(LOCK, 0)
    if not token then
        return nil, "another change of the site is under way"
    end
    local ok, result, err = pcall(reload, _M.generation(), RELOAD_LIMIT + TEST_LIMIT)
    lock.release(LOCK, token)
    if not ok then
        return nil, result
    end
    return result, err
end


return _M
